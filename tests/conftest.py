"""Pools of ranks that the whole run shares, and guards that fail a test which leaves something behind."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported anywhere: both are read only once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import psutil
import pytest

from lightning_moe.testing import RankPool

_POOLS: dict[tuple[int, str], RankPool] = {}
_NOT_LEAKED: set[int] = set()  # the processes of the system after the last test, by their ids
_PATIENCE = 3.0  # seconds that a thread or process which has been told to end may take

# Set by Lightning or its libraries on first use, the same for every test.
_ENVIRONMENT_OF_LIBRARIES = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_MODULE_LOADING",
    "KINETO_LOG_LEVEL",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTEST_CURRENT_TEST",
    "QT_QPA_FONTDIR",
    "QT_QPA_PLATFORM_PLUGIN_PATH",
    "TF_CPP_MIN_LOG_LEVEL",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}

_THREADS_THAT_STAY = (
    "tqdm_monitor",  # tqdm.tqdm.monitor_interval: one for all bars, for ever
    "fsspec",
    "lightning_moe_worker",  # nn/workers.py: idle between layers, until the interpreter ends
    "ThreadPoolExecutor",  # of tensorboard and torch.compile: idle until the interpreter ends
    "pytest_timeout",
)


@pytest.fixture(scope="session")
def get_pool() -> Iterator[Callable[..., RankPool]]:
    """The shared pool of a world size and name; its ranks start with the first task."""

    def get(world_size: int, name: str = "shared") -> RankPool:
        if (world_size, name) not in _POOLS:
            _POOLS[world_size, name] = RankPool(world_size)
        return _POOLS[world_size, name]

    yield get
    ours = {pid for pool in _POOLS.values() for pid in pool.pids}
    for pool in _POOLS.values():
        pool.shutdown()
    left = [pid for pid in ours if psutil.pid_exists(pid)]
    assert not left, f"Ranks {left} outlived the shutdown of their pool."


@pytest.fixture
def pool2(get_pool: Callable[..., RankPool]) -> RankPool:
    return get_pool(2)


@pytest.fixture
def pool4(get_pool: Callable[..., RankPool]) -> RankPool:
    return get_pool(4)


@pytest.fixture
def fragile_pool(get_pool: Callable[..., RankPool]) -> RankPool:
    """Two ranks for the tests that break them: those of `pool2` go on without a restart."""
    return get_pool(2, "fragile")


def pytest_collection_finish() -> None:
    """Leaves modules and thousands of tests out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Ranks compute with one thread, and sums in another order would not be equal bit for bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 2 ms where there is no GPU


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a test writes to relative paths, such as ``lightning_logs``, goes to its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def project_root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        elif name not in _ENVIRONMENT_OF_LIBRARIES:
            del os.environ[name]
    leaked = sorted(changed - _ENVIRONMENT_OF_LIBRARIES)
    assert not leaked, f"The test left these environment variables changed: {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_process_group() -> Iterator[None]:
    yield
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("The test left a process group open in the main process.")


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())

    def new() -> list[threading.Thread]:
        threads = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
        return [t for t in threads if not f"{t.name} {type(t).__name__}".lower().startswith(_LOWER_THREADS)]

    yield
    leaked = _wait_until_empty(new)
    assert not leaked, f"The test left these threads running: {[thread.name for thread in leaked]}"


@pytest.fixture(autouse=True)
def no_leaked_processes() -> Iterator[None]:
    this = psutil.Process()

    def new() -> list[psutil.Process]:
        # Whose child a process is takes psutil far longer to tell than that there is a new one.
        pids = {*psutil.pids()}
        _NOT_LEAKED.intersection_update(pids)
        if pids == _NOT_LEAKED:
            return []
        ranks = {pid for pool in _POOLS.values() for pid in pool.pids}
        # Nothing below a rank: a task's children must have ended with the task.
        found = [c for c in this.children(recursive=True) if c.pid not in ranks and not _is_harmless(c)]
        if not found:
            _NOT_LEAKED.update(pids)
        return found

    yield
    leaked = _wait_until_empty(new)
    described = [f"{child.pid} {' '.join(_command(child))}" for child in leaked]
    for child in leaked:
        child.kill()
    assert not leaked, f"The test left these processes running: {described}"


_LOWER_THREADS = tuple(name.lower() for name in _THREADS_THAT_STAY)


def _wait_until_empty(find: Callable[[], list]) -> list:  # type: ignore[type-arg]
    end = time.monotonic() + _PATIENCE
    while (found := find()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_harmless(process: psutil.Process) -> bool:
    """One that has just ended, or one that multiprocessing keeps: to clean up after its users, and to fork ranks from."""
    kept = "multiprocessing.resource_tracker", "multiprocessing.forkserver"
    try:
        command = " ".join(process.cmdline())
        return process.status() == psutil.STATUS_ZOMBIE or any(name in command for name in kept)
    except psutil.NoSuchProcess:
        return True
