"""Times the layer's forward and backward over the number of tokens and over the number of experts.

    python benchmarks/scaling.py                           # both, in fp32 on one thread and two: ten to twenty minutes
    python benchmarks/scaling.py --only tokens --threads 1 --shape S1

Tokens: 1k to 32k through the layer of a shape; the time per token should be the same within 10 %, largest over
smallest.
Experts: 8 to 256 of the same size at the same tokens and top-k, so that the active FLOPs are the same; the time
should grow by less than 1.5 times from the first. A round calls every size once, in turn; a ratio is the median over
rounds of the ratio within a round.

Exits with 1 where a limit is missed, and lists where.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial

import torch
from peers import DTYPES, OURS, SHAPES, Pass, Problem, Shape
from timing import Timings, alternate, header, progress, report, show, table, threads
from torch import nn

TOKENS = [1024 * 2**i for i in range(6)]
EXPERTS = [8 * 2**i for i in range(6)]
WIDEST, GROWTH = 1.10, 1.5


def build(sizes: dict[str, Shape], dtype: torch.dtype, device: torch.device) -> dict[str, Pass]:
    """A layer for each size; those of the same sizes share their weights."""
    passes: dict[str, Pass] = {}
    modules: dict[Shape, nn.Module] = {}
    for name, shape in sizes.items():
        progress(f"building {name}")
        passes[name] = Problem(shape, dtype, device).build(OURS)
        passes[name].module = modules.setdefault(replace(shape, tokens=0), passes[name].module)
    return passes


def of_tokens(timings: Timings, sizes: dict[str, Shape], where: str) -> list[str]:
    """Prints the time per token and returns what is wrong with it."""
    middle = list(sizes)[len(sizes) // 2]
    per_token = {
        name: timings.ratio(name, middle, sizes[middle].tokens / shape.tokens) for name, shape in sizes.items()
    }
    rows = [
        [
            name,
            f"{timings.median(name) * 1e3:.1f}",
            f"{timings.spread(name):.1%}",
            f"{timings.median(name) / shape.tokens * 1e6:.2f}",
            f"{per_token[name]:.3f}",
        ]
        for name, shape in sizes.items()
    ]
    widest = max(per_token.values()) / min(per_token.values())
    show(table(("tokens", "ms", "spread", "us per token", f"of {middle}"), rows) + f"\n\nlargest/smallest {widest:.3f}")
    if widest > WIDEST:
        return [f"{where}: time per token differs by {widest:.3f} times, more than {WIDEST:.2f}"]
    return []


def of_experts(timings: Timings, sizes: dict[str, Shape], where: str) -> list[str]:
    """Prints the time over the experts and returns what is wrong with it."""
    first = next(iter(sizes))
    growth = {name: timings.ratio(name, first) for name in sizes}
    rows = [
        [name, f"{timings.median(name) * 1e3:.1f}", f"{timings.spread(name):.1%}", f"{growth[name]:.3f}"]
        for name in sizes
    ]
    show(table(("experts", "ms", "spread", f"of {first}"), rows))
    return [
        f"{where}: {name} experts take {ratio:.3f} times as long as {first}, not less than {GROWTH}"
        for name, ratio in growth.items()
        if ratio >= GROWTH
    ]


def say(where: str, text: str) -> None:
    """Shows how far it is."""
    progress(f"{where}: {text}")


def main() -> int:
    """Runs what is asked for and prints a table for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tokens", "experts"], help="one of the two")
    parser.add_argument("--shape", choices=SHAPES, default="S3", help="whose other sizes stay (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], help="fp32")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of torch on the CPU (1 2)")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 for a result to quote (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    args = parser.parse_args()
    device = torch.device(args.device)
    show(header(device))
    problems = []
    shape = SHAPES[args.shape]
    tokens = {f"{count // 1024}k": replace(shape, tokens=count) for count in TOKENS}
    experts = {str(count): replace(shape, experts=count) for count in EXPERTS}
    for kind, sizes, look in (("tokens", tokens, of_tokens), ("experts", experts, of_experts)):
        if args.only not in (None, kind):
            continue
        for dtype in args.dtypes:
            passes = build(sizes, DTYPES[dtype], device)
            for count in args.threads if device.type == "cpu" else [None]:
                where = f"{kind}, {dtype}" + (f", {count} thread{'s' * (count > 1)}" if count else "")
                with threads(count):
                    timings = alternate(passes, args.rounds, progress=partial(say, where))
                show(
                    f"\n{where}; medians of {args.rounds} rounds, forward and backward; "
                    f"{shape}, but for the {kind}; CPU time {timings.busy:.2f} of wall-clock\n"
                )
                problems += look(timings, sizes, where)
            del passes
    return report(problems)


if __name__ == "__main__":
    sys.exit(main())
