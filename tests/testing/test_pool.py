from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from lightning_moe.testing import RankError, RankPool
from lightning_moe.testing import pool as pool_module

# Tasks: the ranks import them from this module.


def rank_and_arguments(*args: Any, **kwargs: Any) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    return dist.get_rank(), args, kwargs


def own_data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.randn(8, generator=torch.Generator().manual_seed(seed + dist.get_rank()))
    total = data.clone()
    dist.all_reduce(total)
    return data, total


def large(megabytes: int) -> torch.Tensor:
    return torch.full((megabytes * 2**18,), float(dist.get_rank()))


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def parameter_with_gradient() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


def environment() -> dict[str, str]:
    return dict(os.environ)


def process_facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "world_size": dist.get_world_size(),
        "folder": os.getcwd(),
        "path": list(sys.path),
    }


def lightning_facts() -> tuple[str, int, int, bool]:
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    with torch.random.fork_rng():
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    assert isinstance(trainer.strategy, DDPStrategy)
    environment = trainer.strategy.cluster_environment
    assert environment is not None
    name = type(environment).__name__
    return name, trainer.world_size, trainer.global_rank, environment.creates_processes_externally


def spoil_the_process(name: str) -> None:
    os.environ[name] = "spoiled"
    os.environ["RANK"] = "99"
    del os.environ["WORLD_SIZE"]
    sys.path.append("/nowhere")
    os.chdir("/")


def draw() -> float:
    return random.random()


def seed_and_draw() -> float:
    random.seed(7)
    return random.random()


def raise_everywhere() -> None:
    raise ValueError(f"wrong on rank {dist.get_rank()}")


def raise_on_one_while_others_wait() -> None:
    print(f"rank {dist.get_rank()} was here")
    if dist.get_rank() == 1:
        raise KeyError("the-missing-key")
    dist.all_reduce(torch.ones(1))


def raise_on_one_only() -> None:
    if dist.get_rank() == 1:
        sys.exit(5)


def end_one(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def sleep_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def start_a_child_and_hang() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    time.sleep(1000)


def unpicklable_result() -> Any:
    return lambda: None


def lose_the_group() -> None:
    dist.destroy_process_group()


def leave_groups(number: int) -> None:
    for _ in range(number):
        dist.new_group([0, 1])


# Tests


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_come_by_rank(get_pool: Callable[..., RankPool], world_size: int) -> None:
    results = get_pool(world_size).run(rank_and_arguments, 1, "a", key=[2])
    assert results == [(rank, (1, "a"), {"key": [2]}) for rank in range(world_size)]


def test_ranks_have_different_data_and_one_group(pool2: RankPool) -> None:
    (first, total_0), (second, total_1) = pool2.run(own_data, seed=3)
    assert not torch.equal(first, second)
    torch.testing.assert_close(total_0, first + second, rtol=0, atol=0)
    torch.testing.assert_close(total_1, total_0, rtol=0, atol=0)


def test_tensors_travel_by_value(pool2: RankPool) -> None:
    assert [result.mean().item() for result in pool2.run(large, 48)] == [0.0, 1.0]
    x = torch.arange(5.0)
    result = pool2.run(double, x)[0]
    result += 1
    assert torch.equal(x, torch.arange(5.0))
    assert [type(p) for p in pool2.run(parameter_with_gradient)] == [torch.nn.Parameter] * 2


def test_ranks_stay_between_tasks(pool2: RankPool) -> None:
    facts = pool2.run(process_facts)
    assert [fact["pid"] for fact in facts] == [fact["pid"] for fact in pool2.run(process_facts)] == pool2.pids
    for fact in facts:
        assert (fact["backend"], fact["world_size"], fact["threads"]) == ("gloo", 2, 1)
        assert fact["folder"] == os.getcwd()


def test_environment_is_that_of_a_launcher(pool2: RankPool) -> None:
    for rank, env in enumerate(pool2.run(environment)):
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        assert {name: env.get(name) for name in expected} == expected
        assert env["MASTER_PORT"].isdigit()
        assert env["TORCHELASTIC_RUN_ID"]
    assert "RANK" not in os.environ


def test_trainer_takes_the_ranks_as_they_are(pool2: RankPool) -> None:
    assert pool2.run(lightning_facts) == [("TorchElasticEnvironment", 2, r, True) for r in range(2)]


def test_environment_path_and_folder_are_restored(pool2: RankPool) -> None:
    before, facts = pool2.run(environment), pool2.run(process_facts)
    pool2.run(spoil_the_process, "SPOILED")
    assert pool2.run(environment) == before
    assert pool2.run(process_facts) == facts


def test_random_state_is_left_alone(pool2: RankPool) -> None:
    generator = random.Random(7)
    assert pool2.run(seed_and_draw) == [generator.random()] * 2
    assert pool2.run(draw) == [generator.random()] * 2


def test_the_same_error_everywhere_costs_no_restart(pool2: RankPool) -> None:
    pids = [fact["pid"] for fact in pool2.run(process_facts)]
    with pytest.raises(RankError, match="wrong on rank 1") as caught:
        pool2.run(raise_everywhere)
    error = caught.value
    assert sorted(error.errors) == [0, 1]
    assert error.unanswered == []
    for rank, failure in error.errors.items():
        assert (failure.type_name, failure.message) == ("ValueError", f"wrong on rank {rank}")
        assert "in raise_everywhere" in failure.traceback
        assert failure.traceback.rstrip() in str(error)
    assert pool2.run(rank_and_arguments)[1][0] == 1
    assert pool2.pids == pids


def test_an_error_while_others_wait_in_a_collective(fragile_pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_GRACE", 0.5)
    pool = fragile_pool
    pool.run(process_facts)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(raise_on_one_while_others_wait)
    assert time.monotonic() - start < 10
    error = caught.value
    assert error.unanswered == [0]
    assert error.errors[1].type_name == "KeyError"
    assert "the-missing-key" in error.errors[1].message
    assert error.errors[0].type_name == "NoAnswer"
    assert "all_reduce" in error.errors[0].traceback
    assert str(error).startswith("raise_on_one_while_others_wait failed on ranks 0, 1 of 2. No answer from rank 0")
    assert "rank 0 was here" in str(error)
    assert "rank 1 was here" in str(error)
    assert [result[0] for result in pool.run(rank_and_arguments)] == [0, 1]


@pytest.mark.grid
def test_an_error_on_one_rank_only_replaces_the_ranks(fragile_pool: RankPool) -> None:
    pool = fragile_pool
    pids = {fact["pid"] for fact in pool.run(process_facts)}
    with pytest.raises(RankError) as caught:
        pool.run(raise_on_one_only)
    assert {rank: error.type_name for rank, error in caught.value.errors.items()} == {1: "SystemExit"}
    assert not pids & {fact["pid"] for fact in pool.run(process_facts)}


@pytest.mark.parametrize(
    ("how", "message"), [pytest.param("exit", "exit code 3", marks=pytest.mark.grid), ("kill", "signal SIGKILL")]
)
def test_a_dead_rank(fragile_pool: RankPool, how: str, message: str) -> None:
    pool = fragile_pool
    pool.run(process_facts)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(end_one, how)
    assert time.monotonic() - start < 10
    assert caught.value.errors[1].type_name == "ProcessDied"
    assert message in caught.value.errors[1].message
    assert 1 in caught.value.unanswered
    assert pool.pids == []
    assert [result[0] for result in pool.run(rank_and_arguments)] == [0, 1]


def test_a_hung_rank_shows_its_stack(fragile_pool: RankPool) -> None:
    pool = fragile_pool
    pool.run(process_facts)
    start = time.monotonic()
    with pytest.raises(RankError, match="within 1 s") as caught:
        pool.run(sleep_on_rank_one, timeout=1)
    assert time.monotonic() - start < 10
    assert caught.value.unanswered == [0, 1]
    assert "in sleep_on_rank_one" in caught.value.errors[1].traceback
    assert caught.value.errors[1].traceback.rstrip() in str(caught.value)
    assert [result[0] for result in pool.run(rank_and_arguments)] == [0, 1]


@pytest.mark.grid
def test_a_rank_that_died_between_tasks_is_replaced(fragile_pool: RankPool) -> None:
    pool = fragile_pool
    pool.run(process_facts)
    os.kill(pool.pids[0], signal.SIGKILL)
    time.sleep(0.2)
    assert [result[0] for result in pool.run(rank_and_arguments)] == [0, 1]


def test_what_cannot_be_pickled_is_an_error(pool2: RankPool) -> None:
    with pytest.raises(RankError, match="pickle"):
        pool2.run(unpicklable_result)
    with pytest.raises(Exception, match=r"pickle|local object"):
        pool2.run(lambda: None)
    assert pool2.run(rank_and_arguments)[1][0] == 1


@pytest.mark.grid
@pytest.mark.parametrize(("task", "args"), [(lose_the_group, ()), (leave_groups, (120,))])
def test_worn_ranks_are_replaced(fragile_pool: RankPool, task: Callable[..., None], args: tuple[int, ...]) -> None:
    pool = fragile_pool
    pool.run(task, *args)
    pids = pool.pids
    _, total = pool.run(own_data, 0)[0]
    assert total.shape == (8,)
    assert not set(pids) & set(pool.pids)


def test_shutdown_leaves_nothing(fragile_pool: RankPool) -> None:
    pool = fragile_pool
    pool.run(process_facts)
    pids, folder = pool.pids, pool._folder
    assert len(pids) == 2
    assert folder is not None
    assert folder.is_dir()
    pool.shutdown()
    assert not any(map(psutil.pid_exists, pids))
    assert not folder.exists()
    assert pool.pids == []
    pool.shutdown()


@pytest.mark.grid
def test_children_of_a_rank_end_with_it(fragile_pool: RankPool) -> None:
    pool = fragile_pool
    pool.run(process_facts)
    rank = psutil.Process(pool.pids[0])
    with pytest.raises(RankError):
        pool.run(start_a_child_and_hang, timeout=2)
    assert not rank.is_running()  # and `no_leaked_processes` looks for the child


_OWNER = """
import sys, time
from lightning_moe.testing import RankPool
from tests.testing.test_pool import process_facts, sleep_on_rank_one

if __name__ == "__main__":
    pool = RankPool(2)
    print(*(fact["pid"] for fact in pool.run(process_facts)), flush=True)
    if sys.argv[1] == "hang":
        pool.run(sleep_on_rank_one)
"""


@pytest.mark.grid
@pytest.mark.parametrize("how", ["hang", "end"])
def test_ranks_end_with_their_parent(tmp_path: Path, project_root: Path, how: str) -> None:
    script = tmp_path / "owner.py"
    script.write_text(_OWNER)
    env = {**os.environ, "PYTHONPATH": str(project_root)}
    owner = subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, env=env, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    if how == "hang":
        time.sleep(0.5)
        assert all(map(psutil.pid_exists, pids))
        owner.kill()
    assert owner.wait(10) == (-signal.SIGKILL if how == "hang" else 0)
    owner.stdout.close()
    end = time.monotonic() + 10
    while any(_is_running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(_is_running(pid) for pid in pids)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_world_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="world_size=0 must be at least 1"):
        RankPool(0)
