"""A pool of rank processes that is started once and then runs one function after the other on every rank.

The first start costs seconds, in which torch, Lightning and DeepSpeed are imported; a task on a running pool
milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_moe.testing._rank import environment, probe, rank_main

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess

T = TypeVar("T")

_PRELOADED = ["lightning_moe.testing._rank", "lightning", "deepspeed", "torch._dynamo"]
_OF_ALL_FORKS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_START_TIMEOUT = 180.0  # a cold import of torch and Lightning by many ranks on two slow cores
_GRACE = 3.0  # after the first failure: how long the other ranks get to answer, too
_TAIL_LINES = 40


@dataclass(frozen=True)
class RankFailure:
    """What is known of the failure of one rank.

    Attributes:
        type_name: Name of the exception's class; ``"ProcessDied"`` or ``"NoAnswer"`` if there was none.
        message: ``str`` of the exception, or what happened to the process.
        traceback: The formatted traceback on the rank, or the stacks of all its threads if it hung.
    """

    type_name: str
    message: str
    traceback: str


class RankError(RuntimeError):
    """One or more ranks failed a task: they raised, died, or did not answer in time.

    Attributes:
        errors: The failures by rank; ranks that finished the task are not in it.
        unanswered: The ranks that gave neither a result nor an exception.
    """

    def __init__(self, headline: str, errors: Mapping[int, RankFailure], output: Mapping[int, str]) -> None:
        self.errors = dict(sorted(errors.items()))
        self.unanswered = [r for r, e in self.errors.items() if e.type_name in ("ProcessDied", "NoAnswer")]
        parts = [headline]
        for rank, error in self.errors.items():
            title = f"--- rank {rank}: {error.type_name}: {error.message}"
            parts.append(f"{title}\n{error.traceback}".rstrip())
            if output.get(rank):
                parts.append(f"--- rank {rank}: end of its output\n{output[rank].rstrip()}")
        super().__init__("\n".join(parts))


class RankPool:
    """Rank processes with an initialised default process group, as a launcher such as torchrun makes them.

    A Lightning ``Trainer`` can run inside a task: it finds the environment of torchrun and starts no process.
    After each task a rank restores ``os.environ``, ``sys.path`` and the working directory; the state of the
    random generators is left alone, so functions seed themselves. The processes start with the first task and
    end with :meth:`shutdown` or with the parent; after a crash, a hang or a task that left the ranks in
    different states, new ones start by themselves.

    Args:
        world_size: Number of ranks.
        backend: Backend of the default process group. With ``"gloo"`` DeepSpeed is told to use the CPU.
        timeout: Seconds that a task may take, and the timeout of the default process group.

    Raises:
        ValueError: If ``world_size`` is not positive.
    """

    def __init__(self, world_size: int, backend: str = "gloo", timeout: float = 60) -> None:
        if world_size < 1:
            raise ValueError(f"world_size={world_size} must be at least 1: it is the number of rank processes.")
        self.world_size = world_size
        self.backend = backend
        self.timeout = timeout
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._processes: list[SpawnProcess | ForkServerProcess] = []
        self._pipes: list[Connection] = []
        self._store: Any = None
        self._folder: Path | None = None
        self._log_offsets = [0] * world_size
        self._must_restart = False
        _LIVE_POOLS.add(self)

    @property
    def pids(self) -> list[int]:
        """Process ids of the running ranks; empty while the pool is not running."""
        return [process.pid for process in self._processes if process.pid is not None]

    def run(self, fn: Callable[..., T], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[T]:
        """Call ``fn(*args, **kwargs)`` on every rank and return the results by rank.

        Everything is pickled by value, CPU tensors too. The ranks run in the caller's working directory.

        Args:
            fn: A function that the ranks can import: defined at the top level of a module.
            *args: Positional arguments, the same for all: ``fn`` asks ``torch.distributed`` for its rank.
            timeout: Seconds for this task instead of the pool's ``timeout``.
            **kwargs: Keyword arguments, the same for all.

        Raises:
            RankError: If a rank raises, dies or does not answer within the timeout.
        """
        with self._lock:
            task = pickle.dumps((fn, args, kwargs))
            if self._must_restart or not all(process.is_alive() for process in self._processes):
                self.shutdown()
            if not self._processes:
                self._start()
            self._log_offsets = [self._log(rank).stat().st_size for rank in range(self.world_size)]
            name = getattr(fn, "__qualname__", repr(fn))
            answers = self._call(task, self.timeout if timeout is None else timeout, name)
            return [pickle.loads(answer) for answer in answers]  # noqa: S301 - from our own child, through a pipe

    def output(self, rank: int, since_last_task: bool = True) -> str:
        """What ``rank`` wrote to stdout and stderr, by default since the last task was started."""
        if self._folder is None:
            return ""
        with self._log(rank).open("rb") as file:
            file.seek(self._log_offsets[rank] if since_last_task else 0)
            return file.read().decode(errors="replace")

    def shutdown(self) -> None:
        """End all rank processes. A later :meth:`run` starts new ones."""
        if os.getpid() != self._owner:
            return  # a fork, such as a worker of a DataLoader, only has a copy of the pool
        with self._lock:
            for pid in self.pids:
                # Each rank leads its own process group: workers of its DataLoaders end with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
            for process in self._processes:
                process.kill()
                process.join()
                process.close()
            for pipe in self._pipes:
                pipe.close()
            self._processes, self._pipes, self._store, self._must_restart = [], [], None, False
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        # At interpreter exit modules may be gone already; `_shutdown_all` has then done the work.
        with contextlib.suppress(Exception):
            self.shutdown()

    def _start(self) -> None:
        from torch.distributed import TCPStore

        # The parent hosts the store: port 0 cannot collide, unlike a free port that is bound later.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = Path(tempfile.mkdtemp(prefix="rank-pool-"))
        context = self._context()
        run_id = uuid.uuid4().hex
        try:
            for rank in range(self.world_size):
                self._log(rank).touch()
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                variables = self._rank_environment(rank, run_id)
                paths = str(self._log(rank)), str(self._stacks(rank))
                process = context.Process(
                    target=rank_main,
                    args=(theirs, self.backend, self.timeout, *paths, {**os.environ, **variables}),
                    name=f"rank-{rank}",
                )
                # A daemon could have no children, but a DataLoader with workers must run in a task.
                process.daemon = False
                # For what reads it when it is imported, which is once for all ranks where they are forks.
                with environment(variables if context.get_start_method() == "spawn" else _OF_ALL_FORKS):
                    process.start()
                theirs.close()
                self._processes.append(process)
            self._log_offsets = [0] * self.world_size
            self._collect(_START_TIMEOUT, "the start of the pool")
        except BaseException:
            self.shutdown()
            raise

    def _context(self) -> SpawnContext | ForkServerContext:
        """How ranks start: on Linux as forks of a process that has imported what they need, in milliseconds.

        Not with CUDA, which does not outlive a fork.
        """
        if self.backend != "gloo" or sys.platform != "linux":
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        return context

    def _rank_environment(self, rank: int, run_id: str) -> dict[str, str]:
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        if self.backend == "gloo":
            env["DS_ACCELERATOR"] = "cpu"
        if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
            # Otherwise gloo resolves the host's name, which fails in many containers.
            env["GLOO_SOCKET_IFNAME"] = "lo"
        return env

    def _call(self, task: bytes, timeout: float, name: str) -> list[bytes]:
        message = pickle.dumps((_absolute_sys_path(), os.getcwd(), task))
        try:
            for pipe in self._pipes:
                # A broken pipe is a dead rank, which `_collect` reports together with the others.
                with contextlib.suppress(OSError):
                    pipe.send_bytes(message)
            return self._collect(timeout, name)
        except RankError as error:
            if self._processes and (len(error.errors) < self.world_size or not self._healthy()):
                self.shutdown()
            raise
        except BaseException:  # an interrupt, or the timeout of the test itself
            self.shutdown()
            raise

    def _healthy(self) -> bool:
        """Whether the group still works after every rank raised: tests of errors then cost no restart."""
        message = pickle.dumps((_absolute_sys_path(), os.getcwd(), pickle.dumps((probe, (), {}))))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
            answers = self._collect(_GRACE, "the check of the process group")
        except (RankError, OSError):
            return False
        return all(pickle.loads(answer) == self.world_size for answer in answers)  # noqa: S301 - from our own child

    def _collect(self, timeout: float, name: str) -> list[bytes]:
        """Read one answer of every rank, or kill the pool if some do not come."""
        results: dict[int, bytes] = {}
        errors: dict[int, RankFailure] = {}
        waiting = dict(enumerate(self._pipes))
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), left)
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    ok, worn, answer = pickle.loads(waiting.pop(rank).recv_bytes())  # noqa: S301 - from our own child
                except (EOFError, OSError):
                    errors[rank] = self._death(rank)
                else:
                    self._must_restart |= worn
                    if ok:
                        results[rank] = answer
                    else:
                        errors[rank] = RankFailure(*answer)
                if rank in errors:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if not waiting and not errors:
            return [results[rank] for rank in range(self.world_size)]
        limit = f"{_GRACE:g} s after the first failure" if errors else f"{timeout:g} s"
        for rank in waiting:
            errors[rank] = RankFailure("NoAnswer", f"no answer within {limit}; its threads were at:", self._dump(rank))
        headline = f"{name} failed on {_names(errors)} of {self.world_size}."
        if waiting:
            headline += f" No answer from {_names(waiting)} within {limit}: the pool was killed."
        error = RankError(headline, errors, {rank: self._tail(rank) for rank in errors})
        if error.unanswered:
            self.shutdown()
        raise error

    def _death(self, rank: int) -> RankFailure:
        process = self._processes[rank]
        process.join(_GRACE)
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return RankFailure("ProcessDied", f"the process ended with {how}", "")

    def _dump(self, rank: int) -> str:
        """Ask a rank that hangs for the stacks of its threads, which works also inside a native call."""
        path, process = self._stacks(rank), self._processes[rank]
        if process.pid is None or not path.exists():
            return "(no stacks: the rank had not yet started)"
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        size, end = -1, time.monotonic() + 2
        # The dump is written piece by piece: wait until it has stopped growing.
        while time.monotonic() < end and (path.stat().st_size == 0 or path.stat().st_size != size):
            size = path.stat().st_size
            time.sleep(0.1)
        return path.read_text(errors="replace") or "(no stacks: the rank did not react to a signal)"

    def _tail(self, rank: int) -> str:
        return "\n".join(self.output(rank).splitlines()[-_TAIL_LINES:])

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rank-{rank}.log"

    def _stacks(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"rank-{rank}.stacks"


_LIVE_POOLS: weakref.WeakSet[RankPool] = weakref.WeakSet()


@atexit.register  # runs before multiprocessing's own handler, which would wait for the ranks for ever
def _shutdown_all() -> None:
    for pool in list(_LIVE_POOLS):
        pool.shutdown()


def _names(ranks: Mapping[int, object]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _absolute_sys_path() -> list[str]:
    return [os.path.abspath(path) for path in sys.path]
