"""Times the dispatchers over gloo ranks and counts their bytes, next to DeepSpeed's capacity-padded all-to-all.

    python benchmarks/dispatch.py                                  # 2 and 4 ranks, S2 and S3: about ten minutes
    python benchmarks/dispatch.py --ranks 2 --shapes S3 --csv dispatch.csv
    python benchmarks/dispatch.py --tokens 256 --rounds 3          # a try in under a minute; its times mean little

All experts are spread over the ranks, one process and one thread each. Every rank has tokens of its own; weights are
the same for all candidates. Each is timed as a whole layer and, but for DeepSpeed's, as a journey alone: there and
back with identity experts, from given routes. Every time is that of forward and backward.

A round runs every candidate once, in a random order and each behind a barrier; its time is that of the slowest rank.
Ratios are medians over rounds of that of two times of one round. Bytes are what one rank sends to others in forward
and backward, a mean over ranks, counted at torch's dispatcher where every collective passes, whoever calls it. They
are what the collectives have to send: an all-gather (R-1) of its input, a reduce-scatter (R-1)/R of its input, an
all-reduce twice that, an all-to-all the rows of others. On the loopback device gloo sends as much (to half a percent)
but for the reduce-scatter, which it makes an all-reduce. "Activations" is without ids, weights and counts.

"fused" sends a token once to every rank that has an expert of it: by the formula for experts drawn with replacement,
(R-1)(1-(1-1/R)^k) rows per token to others, four times: tokens, outputs and the gradients of both. A token's experts
are distinct, so that the exact expectation is a little more.

Exits with 1, and lists where: "fused" is more than 5 % off the formula, ids and weights included; at S3 its layer takes
more than 1.03 times as long as another candidate's in fp32 and one part; "auto" or "tune" chooses a dispatcher whose
layer takes more than 1.05 times as long as the fastest's; or a result differs from the others'.
"""

from __future__ import annotations

import argparse
import csv
import gc
import random
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import SHAPES, DenseFused, Problem, Shape, Weights
from timing import Pass, Timings, header, progress, report, show, table, timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_moe import MoE, MoEConfig
from lightning_moe.dispatch import DISPATCHERS, Dispatcher, make_dispatcher
from lightning_moe.parallel import ExpertGroups, Topology, building_for
from lightning_moe.testing import RankPool

PLAIN = ("allgather", "alltoall", "fused")
OURS: dict[str, dict[str, Any]] = {
    **{name: {"dispatcher": name} for name in PLAIN},
    "alltoall, 2 chunks": {"dispatcher": "alltoall", "overlap_chunks": 2},
    "fused, 2 chunks": {"dispatcher": "fused", "overlap_chunks": 2},
    "alltoall, bf16 on the wire": {"dispatcher": "alltoall", "dispatch_dtype": "bfloat16"},
    "fused, bf16 on the wire": {"dispatcher": "fused", "dispatch_dtype": "bfloat16"},
}
DEEPSPEED = {"DeepSpeed, capacity 1.25": True, "DeepSpeed, no dropping": False}
"""By whether it drops what is over capacity; otherwise it pads to the fullest expert."""

RIVALS = (*PLAIN, *DEEPSPEED)
LAYER, JOURNEY = "layer", "journey"
KINDS = {LAYER: "the whole layer", JOURNEY: "there and back alone, identity experts"}

BYTES_OFF, FUSED_SLOWER, CHOICE_SLOWER = 0.05, 1.03, 1.05
TOLERANCE = {False: 1e-4, True: 2e-2}
"""Relative error of output and input's gradient against the all-gather's, by whether bf16 travels."""

COLUMNS = ("ms", "spread", "time / fastest plain", "MB sent", "activations", "error")


class WireBytes(TorchDispatchMode):
    """Counts what this rank sends to others inside it.

    Args:
        row_bytes: Size of one activation on the wire. Rows at least as long count as one activation each, and what is
            beyond that, like all shorter rows, as metadata.

    Attributes:
        total: Bytes.
        activations: Those of them that are activations or their gradients.
    """

    def __init__(self, row_bytes: int) -> None:
        super().__init__()
        self.row_bytes = row_bytes
        self.total = self.activations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        others, size = dist.get_world_size() - 1, dist.get_world_size()
        if name == "alltoall_base_":
            rows, splits = args[1], args[4]
            self._add(rows, 1 - splits[dist.get_rank()] / max(len(rows), 1) if splits else others / size)
        elif name == "_allgather_base_":
            self._add(args[1], others)
        elif name == "_reduce_scatter_base_":
            self._add(args[1], others / size)
        elif name == "allreduce_":
            for tensor in args[0]:
                self._add(tensor, 2 * others / size)
        else:
            raise NotImplementedError(f"{name}: a collective whose bytes are not counted here")

    def _add(self, tensor: Tensor, times: float) -> None:
        self.total += tensor.nbytes * times
        length = tensor.shape[-1] * tensor.element_size() if tensor.ndim > 1 else 0
        if length >= self.row_bytes:
            self.activations += tensor.nbytes // length * self.row_bytes * times


class Journey(nn.Module):
    """There and back by a dispatcher, with experts that change nothing: returns what it gets."""

    def __init__(
        self, dispatcher: Dispatcher[Any], topk_ids_TK: Tensor, topk_scores_TK: Tensor, num_chunks: int
    ) -> None:
        super().__init__()
        self.dispatcher, self.num_chunks = dispatcher, num_chunks
        self.topk_ids_TK = topk_ids_TK
        self.topk_scores_TK = nn.Parameter(topk_scores_TK)

    def forward(self, x: Tensor) -> Tensor:
        routes = self.dispatcher.plan(self.topk_ids_TK, None, None, self.num_chunks)
        leaving = []
        for part in self.dispatcher.dispatch(x.view(-1, x.shape[-1]), self.topk_scores_TK, routes):
            is_mine_AK = part.plan.row_TK < len(part.plan.assignment_R)
            share_A1 = (part.weights_AK * is_mine_AK).sum(1, keepdim=True)
            leaving.append(self.dispatcher.combine(part.x_AD * share_A1, part))
        return torch.cat([part.wait() for part in leaving]).view_as(x)


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's layer with this rank's experts, without the loss and the counts it returns beside the output."""

    def __init__(self, weights: Weights, shape: Shape, groups: ExpertGroups, drops: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        self.moe = DeepSpeedMoE(
            shape.hidden,
            DenseFused(weights.w1[0], weights.w2[0]),
            num_experts=shape.experts,
            ep_size=groups.ep_size,
            k=shape.top_k,
            capacity_factor=1.25,
            drop_tokens=drops,
            top2_2nd_expert_sampling=False,  # the others do not draw their second expert either
        )
        self.moe.set_deepspeed_parallelism()
        experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(weights.router)
            for expert, number in zip(experts, groups.local_experts(shape.experts), strict=True):
                expert.w1.copy_(weights.w1[number])
                expert.w2.copy_(weights.w2[number])

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


def make_ours(weights: Weights, shape: Shape, groups: ExpertGroups, **options: Any) -> MoE:
    """The layer of this package with this rank's experts."""
    config = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, intermediate_size=shape.ffn, **options)
    with building_for(groups):
        layer = MoE(shape.hidden, config)
    mine = groups.local_experts(shape.experts)
    with torch.no_grad():
        layer.router.get_parameter("weight").copy_(weights.router)
        layer.experts.w1.copy_(weights.w1[mine.start : mine.stop])
        layer.experts.w2.copy_(weights.w2[mine.start : mine.stop])
    return layer


_held: dict[str, dict[str, Pass]] = {}
"""On a rank: the candidates of either kind, from :func:`prepare` to the rounds."""


def is_like(auto: Dispatcher[Any], name: str, shape: Shape, groups: ExpertGroups) -> bool:
    """Whether ``auto`` stands for the dispatcher called so."""
    return name != "local" and type(make_dispatcher(name, shape.experts, groups)) is type(auto)


def prepare(shape: Shape, seed: int) -> dict[str, Any]:
    """On a rank: builds all candidates and returns what is known of them before they are timed."""
    warnings.filterwarnings("ignore", message=".*no AuxLossCallback.*")
    groups = join_groups()
    weights = Problem(replace(shape, tokens=1), torch.float32, torch.device("cpu"), seed).weights
    generator = torch.Generator().manual_seed(seed + 1 + dist.get_rank())
    x, upstream = torch.randn(2, 1, shape.tokens, shape.hidden, generator=generator)
    topk_scores_TK, topk_ids_TK = (x[0] @ weights.router.T).softmax(-1).topk(shape.top_k)
    topk_scores_TK /= topk_scores_TK.sum(-1, keepdim=True)
    layers: dict[str, nn.Module] = {}
    journeys: dict[str, nn.Module] = {}
    for name, options in OURS.items():
        layer = layers[name] = make_ours(weights, shape, groups, **options)
        chunks = options.get("overlap_chunks", 1)
        journeys[name] = Journey(layer.dispatcher, topk_ids_TK, topk_scores_TK.clone(), chunks)
    for name, drops in DEEPSPEED.items():
        layers[name] = DeepSpeedLayer(weights, shape, groups, drops)
    _held.clear()
    for kind, modules in ((LAYER, layers), (JOURNEY, journeys)):
        _held[kind] = {
            name: Pass(module.train(), x.clone().requires_grad_(), upstream.clone()) for name, module in modules.items()
        }
    auto = make_dispatcher("auto", shape.experts, groups)
    return {
        "auto": next(name for name in DISPATCHERS if is_like(auto, name, shape, groups)),
        "tune": tune(make_ours(weights, shape, groups, dispatcher="tune"), x, upstream),
        "threads": torch.get_num_threads(),
        "rows": count_other_ranks(topk_ids_TK, shape, groups),
        "found": {kind: examine(_held[kind]) for kind in KINDS},
    }


def join_groups() -> ExpertGroups:
    """One EP group of all ranks, that DeepSpeed knows as well."""
    from lightning_moe.engine.deepspeed import new_expert_groups, prepare_import, use_cpu

    prepare_import()
    import deepspeed

    use_cpu()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return new_expert_groups(Topology(dist.get_world_size(), dist.get_world_size()))


def count_other_ranks(topk_ids_TK: Tensor, shape: Shape, groups: ExpertGroups) -> float:
    """Other ranks that a token of this one goes to, in the mean."""
    ranks_TK = topk_ids_TK // (shape.experts // groups.ep_size)
    goes_TW = torch.zeros(len(ranks_TK), groups.ep_size).scatter_(1, ranks_TK, 1.0)
    goes_TW[:, groups.ep_rank] = 0
    return float(goes_TW.sum(1).mean())


def tune(layer: MoE, x: Tensor, upstream: Tensor) -> tuple[str | None, dict[str, float]]:
    """What ``tune`` has chosen after its trials, and the medians that it chose by."""
    if layer.tuner is None:
        return None, {}
    candidate = Pass(layer.train(), x.clone().requires_grad_(), upstream)
    for _ in range(layer.tuner.TRIALS):
        timed(candidate)
    return layer.tuner.chosen, {name: statistics.median(times) for name, times in layer.tuner.seconds.items()}


def examine(candidates: dict[str, Pass]) -> dict[str, dict[str, float]]:
    """What one pass of each candidate sends to other ranks, and how far its result is from the all-gather's.

    Returns:
        For each, bytes in all (``total``), those of activations, and the relative error of output and input's gradient.
    """
    found: dict[str, dict[str, float]] = {}
    expected: list[Tensor] = []
    for name, candidate in candidates.items():
        itemsize = 2 if "dispatch_dtype" in OURS.get(name, {}) else candidate.x.element_size()
        with WireBytes(candidate.x.shape[-1] * itemsize) as sent:
            y = candidate.module(candidate.x)
            y.backward(candidate.upstream)
        assert candidate.x.grad is not None
        got = [y.detach(), candidate.x.grad]
        candidate.clear()
        expected = expected or got
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
        found[name] = {"total": sent.total, "activations": sent.activations, "error": error}
    return found


def run_round(kind: str, names: list[str]) -> dict[str, float]:
    """On a rank: seconds of one pass of each candidate, in this order."""
    gc.collect()
    gc.disable()
    try:
        seconds = {}
        for name in names:
            dist.barrier()
            seconds[name] = timed(_held[kind][name])
    finally:
        gc.enable()
    return seconds


def time_all(pool: RankPool, kind: str, names: list[str], rounds: int, where: str) -> Timings:
    """All candidates of a kind, after a round that does not count; times are those of the slowest rank."""
    timings = Timings({name: [] for name in names})
    for number in range(rounds + 1):
        progress(f"{where}, {kind}: " + (f"round {number} of {rounds}" if number else "warm-up"))
        order = random.Random(number).sample(names, len(names))
        by_rank = pool.run(run_round, kind, order)
        if number:
            for name in names:
                timings.seconds[name].append(max(seconds[name] for seconds in by_rank))
    return timings


def fused_bytes(shape: Shape, world: int) -> float:
    """What ``fused`` sends to others by the formula, activations in fp32."""
    return 4 * shape.tokens * shape.hidden * 4 * (world - 1) * (1 - (1 - 1 / world) ** shape.top_k)


def exact_rows(shape: Shape, world: int) -> float:
    """Other ranks that a token goes to if all sets of distinct experts are equally likely."""
    elsewhere = comb(shape.experts - shape.experts // world, shape.top_k)
    return (world - 1) * (1 - elsewhere / comb(shape.experts, shape.top_k))


def mean_of(prepared: list[dict[str, Any]], kind: str, name: str, what: str) -> float:
    """Mean over the ranks of something that :func:`examine` found."""
    return statistics.mean(rank["found"][kind][name][what] for rank in prepared)


def error_of(prepared: list[dict[str, Any]], kind: str, name: str) -> float:
    """The largest error over the ranks."""
    return max(rank["found"][kind][name]["error"] for rank in prepared)


def rows(timings: Timings, prepared: list[dict[str, Any]], kind: str) -> list[dict[str, str]]:
    """The figures of every candidate."""
    fastest, found = timings.fastest(PLAIN), []
    for name in timings.seconds:
        total, activations = (mean_of(prepared, kind, name, what) for what in ("total", "activations"))
        figures = (
            f"{timings.median(name) * 1e3:.0f}",
            f"{timings.spread(name):.1%}",
            f"{timings.ratio(name, fastest):.3f}",
            f"{total / 1e6:.2f}",
            f"{activations / 1e6:.2f}",
            f"{error_of(prepared, kind, name):.0e}",
        )
        found.append({"candidate": name, **dict(zip(COLUMNS, figures, strict=True))})
    return found


def check_results(prepared: list[dict[str, Any]], where: str) -> list[str]:
    """Which candidates compute something else; DeepSpeed's may where it drops."""
    found = []
    for kind in KINDS:
        for name in prepared[0]["found"][kind]:
            error = error_of(prepared, kind, name)
            if not error < TOLERANCE["dispatch_dtype" in OURS.get(name, {})] and not DEEPSPEED.get(name, False):
                found.append(f"{where}: {name}: {kind}'s result is off by {error:.0e}")
    return found


def check_bytes(prepared: list[dict[str, Any]], shape: Shape, world: int, where: str) -> list[str]:
    """Shows what ``fused`` sends and holds it against the formula."""
    wanted = fused_bytes(shape, world)
    total, activations = (mean_of(prepared, LAYER, "fused", what) for what in ("total", "activations"))
    measured = statistics.mean(rank["rows"] for rank in prepared)
    by_formula = wanted / (16 * shape.tokens * shape.hidden)
    show(
        f"\nfused sends {total / 1e6:.2f} MB, {total / wanted:.4f} of the formula's {wanted / 1e6:.2f} MB; activations "
        f"alone {activations / wanted:.4f}. Rows to others per token and way: {measured:.4f}; formula "
        f"{by_formula:.4f}, distinct experts {exact_rows(shape, world):.4f}."
    )
    if abs(total / wanted - 1) > BYTES_OFF:
        return [f"{where}: fused sends {total / wanted:.3f} of the formula's bytes"]
    return []


def check_choices(timings: Timings, prepared: list[dict[str, Any]], where: str) -> list[str]:
    """Shows what ``auto`` and ``tune`` choose and what it costs."""
    problems, fastest = [], timings.fastest(PLAIN)
    chosen, trials = prepared[0]["tune"]
    by = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in trials.items())
    for rule, name in (("auto", prepared[0]["auto"]), ("tune", chosen)):
        if name is None:
            problems.append(f"{where}: {rule} has chosen nothing")
            continue
        ratio = timings.ratio(name, fastest)
        show(
            f"{rule} takes {name}: {ratio:.3f} of {fastest}'s time" + (f" (its trials: {by})" if rule == "tune" else "")
        )
        if ratio > CHOICE_SLOWER:
            problems.append(f"{where}: {rule} takes {name}, {ratio:.3f} of {fastest}'s time")
    return problems


def check_fused(timings: Timings, where: str) -> list[str]:
    """Where ``fused`` is not the fastest."""
    ratios = {name: timings.ratio("fused", name) for name in RIVALS if name != "fused"}
    return [f"{where}: fused takes {r:.3f} of {name}'s time" for name, r in ratios.items() if r > FUSED_SLOWER]


def main() -> int:
    """Runs what is asked for and prints tables for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="processes, one thread each (2 4)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["S2", "S3"], help="S2 S3")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a result to quote (%(default)s)")
    parser.add_argument("--tokens", type=int, help="of each rank, instead of the shape's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (%(default)s)")
    parser.add_argument("--csv", type=Path, help="also write the figures there")
    args = parser.parse_args()
    show(header(torch.device("cpu")))
    problems, records = [], []
    for world in args.ranks:
        with RankPool(world, timeout=600) as pool:
            for name in args.shapes:
                where = f"{name}, {world} ranks"
                shape = replace(SHAPES[name], tokens=args.tokens or SHAPES[name].tokens)
                progress(f"{where}: building, checking and counting bytes")
                prepared = pool.run(prepare, shape, args.seed)
                problems += check_results(prepared, where)
                for kind, what in KINDS.items():
                    timings = time_all(pool, kind, list(prepared[0]["found"][kind]), args.rounds, where)
                    found = rows(timings, prepared, kind)
                    show(
                        f"\n{where}, {prepared[0]['threads']} thread each, gloo: {what}; {shape} on each; medians of "
                        f"{args.rounds} rounds, forward and backward, fp32.\n\n"
                        + table(("candidate", *COLUMNS), [list(row.values()) for row in found])
                    )
                    records += [{"ranks": str(world), "shape": name, "of": kind, **row} for row in found]
                    if kind == LAYER:
                        problems += check_bytes(prepared, shape, world, where)
                        problems += check_choices(timings, prepared, where)
                        problems += check_fused(timings, where) if name == "S3" else []
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
    return report(problems)


if __name__ == "__main__":
    sys.exit(main())
