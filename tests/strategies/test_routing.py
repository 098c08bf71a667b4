"""Every router and every way to treat overflow trains under EP as in one process (DESIGN 4.2)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import AuxLossCallback, MoEConfig
from tests.callbacks.runs import quiet
from tests.selection import one_in
from tests.strategies.test_exactness import Case, check
from tests.toy import BATCH, CONFIG, Toy, ToyData, loader, train_reference

ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk-sigmoid-scaled": {"score_function": "sigmoid", "route_scale": 2.5},
    "topk-score-after": {"score_before_topk": False, "normalize_topk": False},
    "topk-dense": {"top_k": 4},
    "topk-bias": {"expert_bias": True},
    "topk-float64": {"router_dtype": "float64", "jitter": 0.1},
    "switch": {"top_k": 1},
    "gshard": {},
    "noisy_topk": {},
    "sinkhorn": {},
    "expert_choice": {"capacity_factor": 1.5},
    "group_limited": {"num_groups": 2, "topk_groups": 1},
    "hash": {},
    "random": {},
}
OVERFLOW: dict[str, dict[str, Any]] = {
    "dropless": {},
    "drop-score": {"capacity_factor": 0.75, "min_capacity": 1},
    "drop-position": {"capacity_factor": 0.75, "min_capacity": 1, "drop_priority": "position"},
    "drop-random": {"capacity_factor": 0.75, "min_capacity": 1, "drop_priority": "random"},
    "next-score": {"capacity_factor": 0.75, "min_capacity": 1, "overflow": "next_expert"},
    "next-random": {"capacity_factor": 1.0, "overflow": "next_expert", "drop_priority": "random", "min_capacity": 1},
    "padded": {"capacity_factor": 0.75, "min_capacity": 1, "pad_to_capacity": True},
}
DENSE = [{}, {"num_shared_experts": 2, "shared_expert_gate": True}, {"residual": True}]
SGD = {"optimizer": torch.optim.SGD, "learning_rate": 0.3}
STEPS = 2  # plain SGD has no memory: the second step is like every later one


def config_of(router: str, overflow: str, dense: int = 0) -> MoEConfig | None:
    fields = {**OVERFLOW[overflow], **ROUTERS[router]}
    if router == "expert_choice" and fields.get("overflow", "drop") != "drop":
        return None  # refused
    fields = {"score_function": None, "jitter": None, "expert_bias": None, **fields, **DENSE[dense]}
    return replace(CONFIG, router=router.partition("-")[0], **fields)


def cases() -> list[tuple[str, Case]]:
    """Every router with every policy; stages, dispatchers, accumulation and dense parts take turns."""
    found = []
    for number, (router, overflow) in enumerate(itertools.product(ROUTERS, OVERFLOW)):
        config = config_of(router, overflow, number % 3)
        if config is not None:
            case = Case(
                4,
                2,
                stage=number % 4,
                dispatcher=("allgather", "alltoall")[number // 2 % 2],
                accumulate=(1, 2)[number // 3 % 2],
                clip=(None, 0.3)[number // 5 % 2],
                moe=config,
                bias_rate=0.01 if config.expert_bias else 0.0,
            )
            found.append((f"{router}-{overflow}", case))
    return found


ALL = cases()
# By turns, so that every router, every policy and every stage is among them.
SOME = [case for number, case in enumerate(ALL) if (number % 7 + number // 7) % 7 == 0]


def run(case: Case, get_pool: Any, **toy: Any) -> None:
    check(case, get_pool, aux=(0.5, 0.05), steps=STEPS, **SGD, **toy)


def test_the_selection_has_everything() -> None:
    names = [name for name, _ in SOME]
    assert all(any(name.startswith(router) for name in names) for router in ROUTERS)
    assert all(any(name.endswith(overflow) for name in names) for overflow in OVERFLOW)
    assert {case.stage for _, case in SOME} == {0, 1, 2, 3}


@pytest.mark.parametrize("case", [case for _, case in SOME], ids=[name for name, _ in SOME])
def test_run_is_that_of_one_process(case: Case, get_pool: Any) -> None:
    run(case, get_pool)


@pytest.mark.grid
@pytest.mark.parametrize("case", [case for _, case in ALL], ids=[name for name, _ in ALL])
def test_run_is_that_of_one_process_everywhere(case: Case, get_pool: Any) -> None:
    run(case, get_pool)


@pytest.mark.parametrize("router", ["topk", "expert_choice", "sinkhorn", "gshard"])
def test_padding_is_as_in_one_process(router: str, get_pool: Any) -> None:
    config = config_of(router, "dropless")  # a capacity would be that of the rank with most tokens
    assert config is not None
    run(Case(4, 2, 1, "alltoall", moe=config), get_pool, padding=True)


@pytest.mark.parametrize(
    ("router", "recompute"), one_in(2, ["gshard", "noisy_topk", "random", "switch"], ["reentrant", "non-reentrant"])
)
def test_chance_is_the_same_when_activations_are_recomputed(router: str, recompute: str, get_pool: Any) -> None:
    config = config_of(router, "drop-random")
    assert config is not None
    run(Case(4, 2, 2, "alltoall", accumulate=2, moe=config), get_pool, recompute=recompute)


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (4, 4)], ids=str)
def test_chance_does_not_depend_on_the_layout(layout: tuple[int, int], get_pool: Any) -> None:
    """Each equals one process, so that they equal each other."""
    config = config_of("gshard", "drop-random")
    assert config is not None
    run(Case(*layout, stage=1, moe=config), get_pool)


def under_ddp(config: MoEConfig) -> dict[str, Tensor]:
    model, data = Toy(config, **SGD), ToyData(2 * BATCH * 2)
    trainer = quiet(devices=2, strategy="ddp", callbacks=[AuxLossCallback(0.5, 0.05)], max_steps=2)
    trainer.fit(model, loader(data, 2, trainer.global_rank))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_ddp_draws_as_expert_parallelism_does(get_pool: Any) -> None:
    """Ranks of other strategies have their own places in the global batch, too."""
    config = config_of("gshard", "drop-random")
    assert config is not None
    reference = train_reference(Toy(config, **SGD), ToyData(2 * BATCH * 2), 2, 2, load_balancing=0.5, router_z=0.05)
    for state in get_pool(2).run(under_ddp, config):
        for name, weight in reference.state.items():
            assert_close(state[name], weight.float(), rtol=1e-5, atol=1e-6)
