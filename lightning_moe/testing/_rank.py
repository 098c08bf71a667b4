"""What runs in the rank processes of a :class:`~lightning_moe.testing.RankPool`."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

_MAX_OPEN = 500  # files or threads of a rank: each process group that a task leaves behind adds a few of both


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set variables and, at the end, restore ``os.environ`` as a whole, also what the body itself changed."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def rank_main(
    pipe: Connection, backend: str, timeout: float, log: str, stacks: str, variables: Mapping[str, str]
) -> None:
    """Answer the tasks that come through ``pipe`` until the parent closes it or dies.

    Raises:
        RuntimeError: If the process group cannot be made; the parent has then been told so.
    """
    _set_environment(variables)
    os.setsid()
    threading.Thread(target=_end_with_parent, args=(log,), name="end-with-parent", daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    stacks_file = open(stacks, "w")  # noqa: SIM115 - open as long as the process runs
    faulthandler.register(signal.SIGUSR1, stacks_file, all_threads=True)
    try:
        group = _join_group(backend, timeout)
        pipe.send_bytes(pickle.dumps((True, False, b"")))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((False, True, _describe(error))))
        raise
    modules = 0
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        pipe.send_bytes(_perform(message, group))
        if len(sys.modules) > modules:  # what they hold is not looked through again: that is half of a short training
            gc.collect()
            gc.freeze()
            modules = len(sys.modules)


def _set_environment(variables: Mapping[str, str]) -> None:
    """Where this process was forked, that of the other stays, and Lightning has looked for the rank there."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    os.environ.clear()
    os.environ.update(variables)
    rank_zero_only.rank = int(variables["RANK"])  # type: ignore[attr-defined]  # set by Lightning


def _end_with_parent(log: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(os.path.dirname(log), ignore_errors=True)  # what a killed parent could not do
        os.killpg(0, signal.SIGKILL)


def _join_group(backend: str, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore("rank_pool", store), rank=rank, world_size=world_size, timeout=limit
    )
    return dist.group.WORLD


def _perform(message: bytes, group: Any) -> bytes:
    sys_path, folder, task = pickle.loads(message)  # noqa: S301 - from our own parent, through a pipe
    ok, answer = True, b""
    sys_path, sys.path = sys.path, sys_path
    with environment({}):
        try:
            os.chdir(folder)
            fn, args, kwargs = pickle.loads(task)  # noqa: S301 - as above
            answer = pickle.dumps(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, is an answer and not the rank's end
            ok, answer = False, _describe(error)
        finally:
            os.chdir("/")  # the caller may remove its folder before the next task
            sys.path = sys_path
    sys.stdout.flush()
    sys.stderr.flush()
    return pickle.dumps((ok, _is_worn(group), answer))


def _describe(error: BaseException) -> Any:
    text = "".join(traceback.format_exception(error))
    # The frames of the traceback would keep engines and process groups of the failed task alive.
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    return type(error).__name__, str(error), text


def _is_worn(group: Any) -> bool:
    """Whether the rank should be replaced: its group is gone, or too many files or threads are open."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.group.WORLD is not group:
        return True
    folders = ("/proc/self/fd", "/proc/self/task")  # absent outside Linux
    return any(os.path.isdir(folder) and len(os.listdir(folder)) > _MAX_OPEN for folder in folders)


def probe() -> int:
    """The number of ranks, counted by a collective: a task that checks the process group."""
    import torch
    import torch.distributed as dist

    total = torch.ones(1, dtype=torch.long, device="cuda" if "nccl" in dist.get_backend() else "cpu")
    dist.all_reduce(total)
    return int(total)
