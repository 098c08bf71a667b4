"""Times the two ways through the experts on a CPU: tile by tile, and all experts at once by grouped_mm.

    python benchmarks/experts.py

A layer takes the tiles from a size of an expert's first product on (``nn.experts.tiles_are_faster``): this is the table
behind that number. A ratio is that of neighbouring calls, median over the rounds; above 1 tiles are slower.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timing import header, progress, show, table
from torch import Tensor

from lightning_moe.dispatch.permute import plan_permutation
from lightning_moe.nn import GroupedExperts
from lightning_moe.nn.experts import run_by_rows, tiles_are_faster
from lightning_moe.nn.tiles import run_in_tiles
from lightning_moe.parallel import SINGLE_RANK

SHAPES = [(64, 64, 64, 2), (128, 256, 16, 2), (256, 512, 8, 2), (512, 256, 64, 8)]
TOKENS = [1, 16, 64, 256, 1024, 4096]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ratio(run: Callable[[Callable[..., Tensor]], None], rounds: int) -> float:
    """Median of tiles' time over that of grouped_mm."""
    ratios = []
    for _ in range(rounds + 2):
        seconds = []
        for way in (run_in_tiles, run_by_rows):
            start = time.perf_counter()
            run(way)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[2:])


def measure(hidden: int, ffn: int, experts: int, top_k: int, tokens: int, dtype: torch.dtype, rounds: int) -> list[str]:
    """One line of the table."""
    torch.manual_seed(0)
    layer = GroupedExperts(hidden, ffn, experts, "swiglu", SINGLE_RANK).to(dtype)
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, hidden).to(dtype)
    weights = torch.rand(tokens, top_k, requires_grad=True)
    plan = plan_permutation(torch.rand(tokens, experts).argsort(-1)[:, :top_k], experts)

    def forward(way: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            way(x, weights, plan, layer.w1, layer.w2, "swiglu")

    def both(way: Callable[..., Tensor]) -> None:
        layer.w1.grad = layer.w2.grad = x.grad = None
        way(x, weights, plan, layer.w1, layer.w2, "swiglu").backward(upstream)

    size = tokens * top_k / experts * 2 * ffn * hidden / 2**20
    takes = "tiles" if tiles_are_faster(x, plan, layer.w1, layer.w2) else "grouped_mm"
    shape = f"{hidden}, {ffn}, {experts}, top-{top_k}"
    return [shape, str(tokens), f"{size:.2f}", f"{ratio(forward, rounds):.2f}", f"{ratio(both, rounds):.2f}", takes]


def main() -> None:
    """Prints a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a result to quote (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    show(header(torch.device("cpu")))
    for name, dtype in DTYPES.items():
        rows = []
        for shape in SHAPES:
            for tokens in TOKENS:
                progress(f"{name}: {shape}, {tokens} tokens")
                rows.append(measure(*shape, tokens, dtype, args.rounds))
        columns = ("hidden, ffn, experts", "tokens", "2^20 products", "forward", "and backward", "taken")
        show(f"\n{name}, threads: {args.threads}; time of tiles over that of grouped_mm\n\n{table(columns, rows)}")


if __name__ == "__main__":
    main()
