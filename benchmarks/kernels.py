"""Times the Triton kernels of the dispatch on one GPU against its copy bandwidth, and checks what they compute.

    python benchmarks/kernels.py                       # 16384 tokens of 2048 bf16, 8 of 64 experts: under a minute
    python benchmarks/kernels.py --width 7168 --tokens 4096

The bandwidth is that of a device-to-device copy of 2 GiB in the same process, bytes read and written. Those of a kernel
are counted likewise: every row as often as it is read, also where a cache has it, every row that is written, and the
indices and weights. Every call is on the next of several sets of inputs, which together are larger than any cache.

An error is the largest difference from float64, in units of what rounding explains: one ulp of the result and 1e-6 of
what was added up. gather_rows and pack_rows round nothing: theirs is 0 or infinite.

Exits with 1 where a kernel has less than 70% of the copy bandwidth or an error over 1, with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moe.dispatch.permute import Permutation, permute, plan_permutation, unpermute

SHARE = 0.70
COPY_BYTES = 2 * 2**30
GIGA = 1e9


@dataclass(frozen=True)
class Inputs:
    """One set of them. S messages, in token order: half as many as assignments, for experts share ranks."""

    x_TD: Tensor
    y_RD: Tensor
    grad_TD: Tensor
    scores_TK: Tensor
    ids_TK: Tensor
    plan: Permutation
    token_R: Tensor
    token_S: Tensor


@dataclass(frozen=True)
class Kernel:
    """How to run it and torch's equal, how many bytes it moves, and how wrong a result is."""

    run: Callable[[Inputs], Any]
    with_torch: Callable[[Inputs], Any]
    count_bytes: Callable[[Inputs], int]
    error: Callable[[Inputs, Any], float]


def make_inputs(args: argparse.Namespace, seed: int) -> Inputs:
    """Tokens that choose their experts at random."""
    random = torch.Generator("cuda").manual_seed(seed)

    def randn(rows: int) -> Tensor:
        return torch.randn(rows, args.width, device="cuda", dtype=torch.bfloat16, generator=random)

    scores_TE = torch.rand(args.tokens, args.experts, device="cuda", generator=random)
    scores_TK, ids_TK = scores_TE.topk(args.top_k)
    plan = plan_permutation(ids_TK, args.experts)
    num_rows = args.tokens * args.top_k
    token_S = torch.randperm(num_rows, device="cuda", generator=random)[: num_rows // 2] // args.top_k
    return Inputs(
        x_TD=randn(args.tokens),
        y_RD=randn(num_rows),
        grad_TD=randn(args.tokens),
        scores_TK=scores_TK,
        ids_TK=ids_TK,
        plan=plan,
        token_R=plan.assignment_R // args.top_k,
        token_S=token_S.sort().values,
    )


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_roundings(actual: Tensor, exact: Tensor, terms: Tensor) -> float:
    """Largest difference; ``terms`` is the sum of the magnitudes of what was added up."""
    allowed = torch.finfo(actual.dtype).eps * exact.abs() + 1e-6 * terms + torch.finfo(actual.dtype).tiny
    error = ((actual.double() - exact).abs() / allowed).max()
    return float(error.nan_to_num(float("inf")))


def zero_if_equal(actual: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(actual, expected) else float("inf")


def sums_error(inputs: Inputs, actual_TD: Tensor, weights_TK: Tensor | None) -> float:
    """Token by token in parts, for a float64 copy of all rows is four times their size."""
    worst = 0.0
    for part in torch.arange(len(actual_TD), device="cuda").split(1024):
        terms_TKD = inputs.y_RD[inputs.plan.row_TK[part]].double()
        if weights_TK is not None:
            terms_TKD *= weights_TK[part].double().unsqueeze(-1)
        worst = max(worst, in_roundings(actual_TD[part], terms_TKD.sum(1), terms_TKD.abs().sum(1)))
    return worst


def backward_error(inputs: Inputs, actual: tuple[Tensor, Tensor]) -> float:
    """Of both gradients; every assignment has a row here."""
    grad_RD, grad_scores_TK = actual
    scores_N, grad_scores_N = inputs.scores_TK.reshape(-1), grad_scores_TK.reshape(-1)
    worst = 0.0
    for part in torch.arange(len(grad_RD), device="cuda").split(8192):
        assignment = inputs.plan.assignment_R[part]
        grad = inputs.grad_TD[inputs.token_R[part]].double()
        exact = grad * scores_N[assignment].double().unsqueeze(1)
        products = inputs.y_RD[part].double() * grad
        worst = max(
            worst,
            in_roundings(grad_RD[part], exact, torch.zeros_like(exact)),
            in_roundings(grad_scores_N[assignment], products.sum(1), products.abs().sum(1)),
        )
    return worst


def unpermute_backward_with_torch(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What autograd runs for ``unpermute``."""
    y_RD, scores_TK = inputs.y_RD, inputs.scores_TK
    grad_RD = permute(inputs.grad_TD, inputs.plan)
    scores_R1 = scores_TK.reshape(-1, 1).index_select(0, inputs.plan.assignment_R)
    y_TKD = y_RD.index_select(0, inputs.plan.row_TK.reshape(-1)).view(*scores_TK.shape, -1)
    grad_scores_TK = (y_TKD.to(scores_TK.dtype) * inputs.grad_TD.unsqueeze(1)).sum(-1)
    return (grad_RD * scores_R1).to(y_RD.dtype), grad_scores_TK


def pack_with_torch(inputs: Inputs) -> Tensor:
    """The parts cast, viewed as bytes and concatenated; the width fills whole 4 bytes in this benchmark."""
    token_S = inputs.token_S
    parts = [
        inputs.x_TD[token_S].view(torch.uint8),
        inputs.scores_TK[token_S].view(torch.uint8),
        inputs.ids_TK[token_S].to(torch.int32).view(torch.uint8),
    ]
    free = -sum(part.shape[1] for part in parts) % 16
    return torch.cat([*parts, parts[0].new_zeros(len(token_S), free)], dim=1)


def kernels() -> dict[str, Kernel]:
    """All that are timed. Triton comes with a CUDA build of torch, so that the import waits for the check for a GPU."""
    from lightning_moe.dispatch.triton_kernels import gather_rows, pack_rows, sum_rows, unpermute_backward

    def pack(i: Inputs) -> Tensor:
        return pack_rows(i.x_TD, i.token_S, i.scores_TK, i.ids_TK, i.token_S, torch.bfloat16)

    def read_by_pack(i: Inputs) -> int:
        of_a_message = i.x_TD[0].nbytes + i.scores_TK[0].nbytes + i.ids_TK[0].nbytes
        return len(i.token_S) * of_a_message + 2 * nbytes(i.token_S)

    return {
        "gather_rows": Kernel(
            run=lambda i: gather_rows(i.x_TD, i.token_R),
            with_torch=lambda i: permute(i.x_TD, i.plan),
            count_bytes=lambda i: 2 * nbytes(i.y_RD) + nbytes(i.token_R),
            error=lambda i, out: zero_if_equal(out, i.x_TD[i.token_R]),
        ),
        "sum_rows": Kernel(
            run=lambda i: sum_rows(i.y_RD, i.plan.row_TK),
            with_torch=lambda i: i.y_RD[i.plan.row_TK].sum(1),
            count_bytes=lambda i: nbytes(i.y_RD, i.x_TD, i.plan.row_TK),
            error=lambda i, out: sums_error(i, out, None),
        ),
        "sum_rows, weighted": Kernel(
            run=lambda i: sum_rows(i.y_RD, i.plan.row_TK, i.scores_TK),
            with_torch=lambda i: unpermute(i.y_RD, i.scores_TK, i.plan),
            count_bytes=lambda i: nbytes(i.y_RD, i.x_TD, i.plan.row_TK, i.scores_TK),
            error=lambda i, out: sums_error(i, out, i.scores_TK),
        ),
        "unpermute_backward": Kernel(
            run=lambda i: unpermute_backward(i.grad_TD, i.y_RD, i.scores_TK, i.plan.assignment_R),
            with_torch=unpermute_backward_with_torch,
            count_bytes=lambda i: 3 * nbytes(i.y_RD) + nbytes(i.plan.assignment_R) + 3 * nbytes(i.scores_TK),
            error=backward_error,
        ),
        "pack_rows": Kernel(
            run=pack,
            with_torch=pack_with_torch,
            count_bytes=lambda i: read_by_pack(i) + nbytes(pack(i)),
            error=lambda i, out: zero_if_equal(out, pack_with_torch(i)),
        ),
    }


def seconds(call: Callable[[int], Any], repeats: int, warm_up: int) -> float:
    """Median time on the device of a call, which gets its number."""
    for number in range(warm_up):
        call(number)
    torch.cuda.synchronize()
    # Launches run ahead of the device during these, so that no time between two events is that of the host.
    for number in range(warm_up):
        call(number)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for number, (begin, end) in enumerate(events):
        begin.record()
        call(number)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000


def copy_bandwidth(repeats: int, warm_up: int) -> float:
    """Bytes read and written in a second."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda _: target.copy_(source), repeats, warm_up)


@torch.no_grad()
def main() -> int:
    """Checks and times every kernel and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="T (%(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="D, an even number (%(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token (%(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="to choose from (%(default)s)")
    parser.add_argument("--sets", type=int, default=4, help="of inputs, in turn (%(default)s)")
    parser.add_argument("--repeats", type=int, default=40, help="that the median is of (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="calls before them (%(default)s)")
    args = parser.parse_args()
    if args.width % 2 or args.top_k > args.experts or args.repeats < 20:
        parser.error("--width has to be even, --top-k at most --experts and --repeats at least 20")
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU that torch can use: torch.cuda.is_available() is False.", file=sys.stderr)
        return 2

    import triton

    bandwidth = copy_bandwidth(args.repeats, args.warm_up)
    sets = [make_inputs(args, seed) for seed in range(args.sets)]
    print(
        f"{args.tokens} tokens of {args.width} bf16, {args.top_k} of {args.experts} experts each, on "
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, Triton {triton.__version__}. "
        f"A copy runs at {bandwidth / GIGA:.0f} GB/s.\n"
    )
    print("| kernel | microseconds | GB/s | share of a copy | torch, microseconds | error |\n|---|---|---|---|---|---|")
    wrong = []
    for name, kernel in kernels().items():
        error = max(kernel.error(inputs, kernel.run(inputs)) for inputs in sets)
        time = seconds(lambda n, run=kernel.run: run(sets[n % len(sets)]), args.repeats, args.warm_up)
        of_torch = seconds(lambda n, run=kernel.with_torch: run(sets[n % len(sets)]), args.repeats, args.warm_up)
        rate = kernel.count_bytes(sets[0]) / time
        share = rate / bandwidth
        print(
            f"| {name} | {time * 1e6:.0f} | {rate / GIGA:.0f} | {share:.2f} | {of_torch * 1e6:.0f} | {error:.2f} |",
            flush=True,
        )
        if share < SHARE:
            wrong.append(f"{name} has {share:.2f} of the bandwidth of a copy, not {SHARE}")
        if error > 1:
            wrong.append(f"{name} is off by {error:.2f} times what rounding explains")
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
