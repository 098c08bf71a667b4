"""Times the layer's forward and backward against a dense layer of the same active FLOPs and against its peers.

    python benchmarks/layer.py                             # CPU: S1, S2, S3 in fp32 and bf16 on one thread and two
    python benchmarks/layer.py --shapes S1 --dtypes fp32 --threads 1 --peers Mixtral DeepSpeed
    python benchmarks/layer.py --peers none                # against the dense limit only
    python benchmarks/layer.py --device cuda               # the GPU shape in bf16

The limit is the faster of two dense SwiGLU layers of one expert's size on tokens * top_k rows: gate and up in one
product, or in two. Efficiency is the limit's time over that of a layer. In a round every candidate runs once, each
right after a call of ours; a ratio to ours is the median over rounds of that of two such neighbours. All candidates
have the same weights, tokens and upstream gradient; before timing, each one's output and gradients are held against a
reference: that is the column "error", the largest relative one. All of it takes about half an hour on the CPU.

Exits with 1 where ours misses its efficiency or is not faster than a peer, and lists where.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import partial
from pathlib import Path

import torch
from peers import DTYPES, LIMITS, OURS, PEERS, SHAPES, Pass, Problem, Reference, Unavailable
from timing import Timings, alternate, header, progress, report, show, table, threads

TARGETS = {
    ("S1", "fp32"): 1.0,
    ("S2", "fp32"): 1.05,
    ("S3", "fp32"): 1.0,
    ("S1", "bf16"): 0.95,
    ("S2", "bf16"): 0.95,
    ("S3", "bf16"): 0.95,
    ("GPU", "bf16"): 0.8,
}
COLUMNS = ("layer", "ms", "spread", "GFLOP/s", "efficiency", "time / ours", "error")


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="S1 S2 S3, or GPU on one")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="fp32 bf16, or bf16 on a GPU")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of torch on the CPU (1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a result to quote (%(default)s)")
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help=f"beginnings of their names, or none; all of: {'; '.join(PEERS)}"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--csv", type=Path, help="also write the figures there")
    args = parser.parse_args()
    on_cpu = torch.device(args.device).type == "cpu"
    args.shapes = args.shapes or (["S1", "S2", "S3"] if on_cpu else ["GPU"])
    args.dtypes = args.dtypes or (["fp32", "bf16"] if on_cpu else ["bf16"])
    args.threads = args.threads if on_cpu else [None]
    args.peers = chosen(args.peers, parser)
    return args


def chosen(asked: list[str] | None, parser: argparse.ArgumentParser) -> list[str]:
    """Full names of the peers that begin like this."""
    if asked is None:
        return list(PEERS)
    names = [name for name in PEERS if name.lower().startswith(tuple(start.lower() for start in asked))]
    if not names and asked != ["none"]:
        parser.error(f"--peers: none begins with {' or '.join(asked)}. Known: {'; '.join(PEERS)}")
    return names


def prepare(problem: Problem, peers: list[str]) -> tuple[dict[str, Pass], dict[str, float], dict[str, str]]:
    """Builds and checks the candidates: those that work, how far each is from the reference, and why others do not."""
    reference = Reference(problem)
    passes, errors, reasons = {}, {}, {}
    for name in [OURS, *LIMITS, *peers]:
        progress(f"checking {name}")
        try:
            candidate = problem.build(name)
            errors[name] = reference.error(candidate, name)
            passes[name] = candidate
        except Unavailable as reason:
            if name not in peers:
                raise
            reasons[name] = str(reason)
    return passes, errors, reasons


def rows(timings: Timings, problem: Problem, errors: dict[str, float]) -> list[dict[str, str]]:
    """The figures of every candidate that ran."""
    limit = timings.fastest(LIMITS)
    return [
        {
            "layer": name,
            "ms": f"{timings.median(name) * 1e3:.2f}",
            "spread": f"{timings.spread(name):.1%}",
            "GFLOP/s": f"{problem.shape.flops / timings.median(name) / 1e9:.0f}",
            "efficiency": f"{timings.ratio(limit, name):.3f}",
            "time / ours": f"{timings.ratio(name, OURS):.2f}",
            "error": f"{errors[name]:.0e}" if name not in LIMITS else "",
        }
        for name in timings.seconds
    ]


def missed(timings: Timings, target: float | None, peers: list[str], where: str) -> list[str]:
    """Where ours falls short."""
    problems = []
    efficiency = timings.ratio(timings.fastest(LIMITS), OURS)
    if target is not None and efficiency < target:
        problems.append(f"{where}: {efficiency:.3f} of the dense limit, not {target:.2f}")
    return problems + [
        f"{where}: {name} takes {timings.ratio(name, OURS):.3f} of our time"
        for name in peers
        if timings.ratio(name, OURS) <= 1
    ]


def say(where: str, text: str) -> None:
    """Shows how far it is."""
    progress(f"{where}: {text}")


def main() -> int:
    """Runs what is asked for and prints a table for each combination."""
    args = arguments()
    device = torch.device(args.device)
    show(header(device))
    problems, records = [], []
    for shape in args.shapes:
        for dtype in args.dtypes:
            problem = Problem(SHAPES[shape], DTYPES[dtype], device)
            passes, errors, reasons = prepare(problem, args.peers)
            for count in args.threads:
                where = f"{shape} {dtype}" + (f" {count} thread{'s' * (count > 1)}" if count else "")
                with threads(count):
                    timings = alternate(
                        passes,
                        args.rounds,
                        anchor=OURS,
                        warmup=1 if count else 3,
                        progress=partial(say, where),
                    )
                found = rows(timings, problem, errors)
                show(
                    f"\n{where}: {SHAPES[shape]}; load imbalance {problem.load_imbalance():.2f}; medians of "
                    f"{args.rounds} rounds, forward and backward; the limit is {timings.fastest(LIMITS)}; "
                    f"CPU time {timings.busy:.2f} of wall-clock.\n\n"
                    + table(COLUMNS, [list(row.values()) for row in found])
                )
                for name, why in reasons.items():
                    show(f"not in the table: {name}: {why}")
                problems += missed(timings, TARGETS.get((shape, dtype)), [p for p in args.peers if p in passes], where)
                run = {"device": device.type, "shape": shape, "dtype": dtype, "threads": count or ""}
                records += [{**run, **row} for row in found]
            del passes
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
    return report(problems)


if __name__ == "__main__":
    sys.exit(main())
