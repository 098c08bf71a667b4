"""Measures the memory of one forward and backward of the layer and of its peers, by default at S3.

    python benchmarks/memory.py                            # fp32 and bf16: a few minutes on the CPU
    python benchmarks/memory.py --device cuda --shapes GPU

Each candidate has a process of its own. On the CPU "peak" is the largest sum of the tensors that are alive at once,
from torch's own allocator: ``torch.profiler`` records every allocation and release in order. That is exact and the
same in every run. Everything counts from what weights, input and upstream gradient take: the peak has the gradients of
weights and input in it. On CUDA it is ``torch.cuda.max_memory_allocated``.

* "less weight gradients": the peak without the bytes that the weights' gradients have in the end.
* "after forward": what forward leaves alive for backward, the output included.
* "saved": distinct storages, other than weights and input, that autograd saved through ``save_for_backward``.
* "resident": how far the process grew above what it was before, as the kernel counts pages: a check on the first
  column that also sees what libraries allocate by themselves. It differs a little between runs, and freed memory that
  the C library keeps is in it.

Exits with 1 where a peer's peak is more than 1 % below ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers import DTYPES, LIMITS, OURS, PEERS, SHAPES, Pass, Problem, Unavailable, attempt
from timing import header, progress, report, show, synchronize, table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

COLUMNS = ("layer", "peak MiB", "of ours", "less weight gradients", "after forward", "saved", "resident")
TOLERANCE = 0.01
MIB = 2**20


def saved_bytes(candidate: Pass) -> int:
    """Bytes of the distinct storages that forward saves, other than weights and input."""
    known = {candidate.x.untyped_storage().data_ptr()}
    known |= {parameter.untyped_storage().data_ptr() for parameter in candidate.module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = candidate.module(candidate.x)
    del y
    return sum(found.values())


def allocated(prof: profile) -> tuple[int, int]:
    """The highest and the last sum over all allocations and releases so far."""
    results: Any = prof.profiler.kineto_results if prof.profiler else None  # typed in part
    events = [event for event in results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak, current


def measure_cpu(candidate: Pass) -> tuple[int, int]:
    """Peak of a whole pass and what is left after its forward, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        y = candidate.module(candidate.x)
    _, held = allocated(forward)
    del y
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as whole:
        candidate()
    peak, _ = allocated(whole)
    return peak, held


def measure_cuda(candidate: Pass) -> tuple[int, int]:
    """The same, from the caching allocator."""
    device = candidate.x.device
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    y = candidate.module(candidate.x)
    held = torch.cuda.memory_allocated(device) - before
    y.backward(candidate.upstream)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, held


def resident_bytes(candidate: Pass) -> int | None:
    """How far the resident set grows in one pass; ``None`` where the kernel does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
    except OSError:
        return None
    before = _status("VmRSS")
    candidate()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(name: str, shape: str, dtype: str, device: str) -> dict[str, int | None]:
    """All figures of one candidate, in this process."""
    problem = Problem(SHAPES[shape], DTYPES[dtype], torch.device(device))
    candidate = problem.build(name)
    attempt(candidate)  # a warm-up: what is made once is not in the figures
    candidate.clear()
    gc.collect()
    on_cpu = candidate.x.device.type == "cpu"
    peak, held = (measure_cpu if on_cpu else measure_cuda)(candidate)
    gradients = sum(p.grad.nbytes for p in candidate.module.parameters() if p.grad is not None)
    candidate.clear()
    gc.collect()
    saved = saved_bytes(candidate)
    resident = resident_bytes(candidate) if on_cpu else None
    return {"peak": peak, "gradients": gradients, "held": held, "saved": saved, "resident": resident}


def measure_apart(name: str, shape: str, dtype: str, device: str, threads: int) -> dict[str, int | None]:
    """The same in a process of its own.

    Raises:
        Unavailable: it cannot run here.
    """
    command = [sys.executable, __file__, "--one", name, "--shapes", shape, "--dtypes", dtype, "--device", device]
    # Memory that is freed goes back at once: the resident set then follows what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in found:
        raise Unavailable(found["unavailable"])
    return found


def row(name: str, found: dict[str, int | None], ours: dict[str, int | None]) -> list[str]:
    """One line of the table."""
    peak, gradients, our_peak = found["peak"] or 0, found["gradients"] or 0, ours["peak"] or 1
    rest = [peak - gradients, found["held"], found["saved"], found["resident"]]
    cells = ["" if value is None else f"{value / MIB:.1f}" for value in rest]
    return [name, f"{peak / MIB:.1f}", f"{peak / our_peak:.2f}", *cells]


def main() -> int:
    """Measures what is asked for and prints a table for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["S3"], help="S3")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="fp32 bf16")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        try:
            print(json.dumps(measure(args.one, args.shapes[0], args.dtypes[0], args.device)))
        except Unavailable as reason:
            print(json.dumps({"unavailable": str(reason)}))
        return 0

    show(header(torch.device(args.device)))
    problems = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            found, reasons = {}, {}
            for name in [OURS, *LIMITS, *PEERS]:
                progress(f"{shape} {dtype}: {name}")
                try:
                    found[name] = measure_apart(name, shape, dtype, args.device, args.threads)
                except Unavailable as reason:
                    reasons[name] = str(reason)
            ours = found[OURS]
            rows = [row(name, figures, ours) for name, figures in found.items()]
            show(
                f"\n{shape} {dtype}, {args.threads} thread{'s' * (args.threads > 1)}: {SHAPES[shape]}; forward and "
                f"backward, beyond weights, input and upstream gradient.\n\n{table(COLUMNS, rows)}"
            )
            for name, why in reasons.items():
                show(f"not in the table: {name}: {why}")
            problems += [
                f"{shape} {dtype}: {name} peaks at {(found[name]['peak'] or 0) / MIB:.1f} MiB, ours at "
                f"{(ours['peak'] or 0) / MIB:.1f}"
                for name in PEERS
                if name in found and (found[name]["peak"] or 0) < (1 - TOLERANCE) * (ours["peak"] or 0)
            ]
    return report(problems)


if __name__ == "__main__":
    sys.exit(main())
