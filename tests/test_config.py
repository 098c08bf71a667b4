"""Every wrong field is refused by its name, value, rule and remedy, word for word."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from lightning_moe import MoEConfig

FACTOR_RULE = "must be a finite number above 0. Use 1.25, or null to drop nothing."
SCALE_RULE = "must be a finite number above 0. Use 1 for no scaling."
JITTER_RULE = "must be at least 0 and below 1. Use 0.01, or 0 for none."
TOLERANCE_RULE = "must be a finite number above 0. Use 1e-3, for example."
WHOLE_RULE = "must be a whole number. Write it without a point or quotes."
WHOLE = ("num_experts", "top_k", "intermediate_size", "min_capacity", "num_shared_experts", "overlap_chunks")
LEARNED = "expert_choice' or 'group_limited' or 'gshard' or 'noisy_topk' or 'sinkhorn' or 'switch' or 'topk"

# The least that every built-in router needs, and what its None stands for: score_function, expert_bias, jitter.
ROUTERS: dict[str, tuple[dict[str, Any], tuple[str, bool, float]]] = {
    "expert_choice": ({"capacity_factor": 2.0}, ("softmax", False, 0.0)),
    "group_limited": ({"num_groups": 2, "topk_groups": 1}, ("sigmoid", True, 0.0)),
    "gshard": ({"top_k": 2}, ("softmax", False, 0.0)),
    "hash": ({}, ("softmax", False, 0.0)),
    "noisy_topk": ({}, ("softmax", False, 0.0)),
    "random": ({}, ("softmax", False, 0.0)),
    "sinkhorn": ({}, ("softmax", False, 0.0)),
    "switch": ({"top_k": 1}, ("softmax", False, 0.01)),
    "topk": ({}, ("softmax", False, 0.0)),
    "mine": ({}, ("softmax", False, 0.0)),  # registered by a user, or not yet
}
every_router = pytest.mark.parametrize("router", ROUTERS)


def make(router: str, **changes: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 4, "router": router, **ROUTERS[router][0], **changes})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0, "top_k": 1}, "num_experts=0: must be at least 1. Use 8, for example."),
        ({"num_experts": -8}, "num_experts=-8: must be at least 1. Use 8, for example."),
        ({"top_k": 0}, "top_k=0: must be from 1 to num_experts=4. Lower top_k or add experts."),
        ({"top_k": -1}, "top_k=-1: must be from 1 to num_experts=4. Lower top_k or add experts."),
        ({"top_k": 5}, "top_k=5: must be from 1 to num_experts=4. Lower top_k or add experts."),
        (
            {"num_experts": 1},  # the default of top_k is 2
            "top_k=2: must be from 1 to num_experts=1. Lower top_k or add experts.",
        ),
        (
            {"intermediate_size": 0},
            "intermediate_size=0: must be at least 1. Leave it out for 4 x hidden_size.",
        ),
        (
            {"intermediate_size": -3},
            "intermediate_size=-3: must be at least 1. Leave it out for 4 x hidden_size.",
        ),
        ({"capacity_factor": 0}, f"capacity_factor=0: {FACTOR_RULE}"),
        ({"capacity_factor": 0.0}, f"capacity_factor=0.0: {FACTOR_RULE}"),
        ({"capacity_factor": -1.5}, f"capacity_factor=-1.5: {FACTOR_RULE}"),
        ({"capacity_factor": float("nan")}, f"capacity_factor=nan: {FACTOR_RULE}"),
        ({"capacity_factor": float("inf")}, f"capacity_factor=inf: {FACTOR_RULE}"),
        ({"capacity_factor": float("-inf")}, f"capacity_factor=-inf: {FACTOR_RULE}"),
        ({"eval_capacity_factor": 0.0}, f"eval_capacity_factor=0.0: {FACTOR_RULE}"),
        ({"eval_capacity_factor": -2.0}, f"eval_capacity_factor=-2.0: {FACTOR_RULE}"),
        ({"eval_capacity_factor": float("nan")}, f"eval_capacity_factor=nan: {FACTOR_RULE}"),
        ({"eval_capacity_factor": float("inf")}, f"eval_capacity_factor=inf: {FACTOR_RULE}"),
        ({"min_capacity": 0}, "min_capacity=0: must be at least 1 row. Use 4, for example."),
        ({"min_capacity": -4}, "min_capacity=-4: must be at least 1 row. Use 4, for example."),
        (
            {"num_shared_experts": -1},
            "num_shared_experts=-1: must be 0 or more. Use 0 for no shared expert.",
        ),
        ({"activation": "silu"}, "activation='silu': unknown. Known: swiglu, gelu, relu."),
        ({"activation": None}, "activation=None: unknown. Known: swiglu, gelu, relu."),
        ({"score_function": "tanh"}, "score_function='tanh': unknown. Known: softmax, sigmoid."),
        ({"overflow": "next"}, "overflow='next': unknown. Known: drop, next_expert."),
        ({"drop_priority": "last"}, "drop_priority='last': unknown. Known: score, position, random."),
        ({"router_dtype": "bfloat16"}, "router_dtype='bfloat16': unknown. Known: float32, float64."),
        ({"dispatch_dtype": "float16"}, "dispatch_dtype='float16': unknown. Known: bfloat16."),
        ({"overlap_chunks": 0}, "overlap_chunks=0: must be at least 1. Use 1 to send all at once."),
        ({"route_scale": 0}, f"route_scale=0: {SCALE_RULE}"),
        ({"route_scale": -2.5}, f"route_scale=-2.5: {SCALE_RULE}"),
        ({"route_scale": float("nan")}, f"route_scale=nan: {SCALE_RULE}"),
        ({"route_scale": float("inf")}, f"route_scale=inf: {SCALE_RULE}"),
        ({"jitter": -0.01}, f"jitter=-0.01: {JITTER_RULE}"),
        ({"jitter": 1}, f"jitter=1: {JITTER_RULE}"),
        ({"jitter": 1.5}, f"jitter=1.5: {JITTER_RULE}"),
        ({"jitter": float("nan")}, f"jitter=nan: {JITTER_RULE}"),
        *(({name: value}, f"{name}={value!r}: {WHOLE_RULE}") for name in WHOLE for value in (2.0, "2", 1.5)),
        *(({name: None}, f"{name}=None: {WHOLE_RULE}") for name in WHOLE if name != "intermediate_size"),
        ({"router": "group_limited", "num_groups": 2.0}, f"num_groups=2.0: {WHOLE_RULE}"),
        ({"router": "group_limited", "topk_groups": "1"}, f"topk_groups='1': {WHOLE_RULE}"),
        ({"router": "sinkhorn", "sinkhorn_iterations": 10.5}, f"sinkhorn_iterations=10.5: {WHOLE_RULE}"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoEConfig(**{"num_experts": 4, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            (
                {"router": "switch", "top_k": top_k},
                f"top_k={top_k}: router='switch' takes 1 expert per token. Use top_k=1, or router='topk'.",
            )
            for top_k in (2, 4)
        ),
        ({"router": "switch"}, "top_k=2: router='switch' takes 1 expert per token. Use top_k=1, or router='topk'."),
        *(
            (
                {"router": "gshard", "top_k": top_k},
                f"top_k={top_k}: router='gshard' takes 2 experts per token. Use top_k=2, or router='topk'.",
            )
            for top_k in (1, 3)
        ),
        *(
            (
                {"router": "group_limited", "num_groups": groups},
                (
                    f"num_groups={groups}: must divide num_experts=12. Use a number of groups that does, or another "
                    "number of experts."
                ),
            )
            for groups in (5, 24, 0, -3)
        ),
        *(
            (
                {"router": "group_limited", "num_groups": 4, "topk_groups": kept},
                f"topk_groups={kept}: must be from 1 to num_groups=4. Lower topk_groups or make more groups.",
            )
            for kept in (5, 0, -1)
        ),
        (
            {"router": "group_limited", "topk_groups": 2},  # the default of num_groups is 1
            "topk_groups=2: must be from 1 to num_groups=1. Lower topk_groups or make more groups.",
        ),
        (
            {"router": "group_limited", "num_groups": 4, "topk_groups": 2, "top_k": 7},
            (
                "top_k=7: must be at most 6, the experts in the topk_groups=2 groups that a token may use. Lower top_k or raise "
                "topk_groups."
            ),
        ),
        (
            {"router": "group_limited", "num_groups": 12, "topk_groups": 1, "top_k": 2},
            (
                "top_k=2: must be at most 1, the experts in the topk_groups=1 groups that a token may use. Lower top_k or raise "
                "topk_groups."
            ),
        ),
        (
            {"router": "expert_choice", "capacity_factor": 2.0, "overflow": "next_expert"},
            (
                "overflow='next_expert': with router='expert_choice' experts choose as many tokens as they have room for, "
                "and nothing overflows. Use overflow='drop', or another router."
            ),
        ),
        *(
            (
                {"router": "expert_choice", **others},
                (
                    "capacity_factor=None: router='expert_choice' needs it, the mean number of experts per token. Use 2, "
                    "for example."
                ),
            )
            for others in ({}, {"eval_capacity_factor": 2.0})
        ),
        (
            {"overflow": "next_expert"},
            (
                "overflow='next_expert': without a capacity_factor nothing overflows. Set capacity_factor, to 1.25 for "
                "example, or use overflow='drop'."
            ),
        ),
        (
            {"pad_to_capacity": True},
            (
                "pad_to_capacity=True: without a capacity_factor there is no capacity to pad to. Set capacity_factor, to "
                "1.25 for example, or use pad_to_capacity=False."
            ),
        ),
        (
            {"shared_expert_gate": True},
            (
                "shared_expert_gate=True: there is no shared expert to weigh. Set num_shared_experts to 1 or more, or "
                "leave the gate out."
            ),
        ),
        (
            {"residual": True, "num_shared_experts": 2},
            "residual=True: its dense MLP takes the place of num_shared_experts=2 shared experts. Use one of the two.",
        ),
        ({"router": "sinkhorn", "sinkhorn_tolerance": 0}, f"sinkhorn_tolerance=0: {TOLERANCE_RULE}"),
        ({"router": "sinkhorn", "sinkhorn_tolerance": -0.1}, f"sinkhorn_tolerance=-0.1: {TOLERANCE_RULE}"),
        ({"router": "sinkhorn", "sinkhorn_tolerance": float("nan")}, f"sinkhorn_tolerance=nan: {TOLERANCE_RULE}"),
        ({"router": "sinkhorn", "sinkhorn_tolerance": float("inf")}, f"sinkhorn_tolerance=inf: {TOLERANCE_RULE}"),
        ({"router": "sinkhorn", "sinkhorn_iterations": 0}, "sinkhorn_iterations=0: must be at least 1. Use 100."),
        ({"router": "sinkhorn", "sinkhorn_iterations": -5}, "sinkhorn_iterations=-5: must be at least 1. Use 100."),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoEConfig(**{"num_experts": 12, **fields})


# What only some routers read, with a value that is nobody's default, and who reads it.
READ_BY: dict[str, tuple[Any, str]] = {
    "score_before_topk": (False, "topk"),
    "route_scale": (2.5, "topk' or 'group_limited' or 'sinkhorn"),
    "jitter": (0.2, LEARNED),
    "num_groups": (4, "group_limited"),
    "topk_groups": (2, "group_limited"),
    "sinkhorn_tolerance": (0.1, "sinkhorn"),
    "sinkhorn_iterations": (5, "sinkhorn"),
}


@every_router
@pytest.mark.parametrize("name", [*READ_BY, "score_function", "expert_bias"])
def test_what_the_router_does_not_read_is_refused(router: str, name: str) -> None:
    if name == "score_function":
        value, readers = "sigmoid", "topk' or 'group_limited' or 'sinkhorn"
    elif name == "expert_bias":
        value, readers = True, "topk' or 'group_limited"
    else:
        value, readers = READ_BY[name]
    if router in readers.split("' or '") or router == "mine":
        changes = {"num_groups": 4, "topk_groups": 2} if router == "group_limited" else {}
        assert getattr(make(router, **{**changes, name: value}), name) == value
        return
    message = f"{name}={value!r}: router={router!r} does not read it. Leave it out, or use router='{readers}'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(router, **{name: value})


@every_router
def test_none_is_the_routers_own_default(router: str) -> None:
    config = make(router)
    assert (config.score_function, config.expert_bias, config.jitter) == (None, None, None)
    resolved = config.resolved()
    assert (resolved.score_function, resolved.expert_bias, resolved.jitter) == ROUTERS[router][1]
    assert resolved.resolved() is resolved
    score_function, expert_bias, jitter = ROUTERS[router][1]
    assert make(router, score_function=score_function, expert_bias=expert_bias, jitter=jitter) == resolved


def test_another_router_brings_its_own_defaults() -> None:
    changed = dataclasses.replace(make("switch"), router="group_limited", num_groups=4, topk_groups=2).resolved()
    assert (changed.score_function, changed.expert_bias, changed.jitter) == ROUTERS["group_limited"][1]
    assert dataclasses.replace(make("group_limited"), router="topk", num_groups=1, topk_groups=1).resolved().jitter == 0


def test_what_somebody_set_is_no_default() -> None:
    config = make("group_limited", score_function="softmax", expert_bias=False)
    assert (config.score_function, config.expert_bias) == ("softmax", False)
    assert dataclasses.replace(config, top_k=1).score_function == "softmax"
    assert make("switch", jitter=0).jitter == 0
    assert dataclasses.replace(make("switch", jitter=0), num_experts=8).jitter == 0


@every_router
def test_copies_and_dictionaries_are_as_good_as_the_config(router: str) -> None:
    config = make(router)
    as_dict = dataclasses.asdict(config)
    assert MoEConfig(**as_dict) == config
    changed = dataclasses.replace(config, capacity_factor=1.5)
    assert changed == make(router, capacity_factor=1.5)
    assert dataclasses.asdict(changed) == {**as_dict, "capacity_factor": 1.5}
    if router != "expert_choice":
        assert dataclasses.replace(changed, capacity_factor=config.capacity_factor) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "top_k": 1},
        {"top_k": 4},
        {"intermediate_size": 1},
        {"capacity_factor": 1e-6, "eval_capacity_factor": 1e6},
        {"capacity_factor": 1},
        {"min_capacity": 1},
        {"num_shared_experts": 0},
        {"num_shared_experts": 3},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"jitter": 0},
        {"jitter": 0.999},
        {"score_function": "sigmoid", "expert_bias": True, "score_before_topk": False, "route_scale": 1e-3},
        {"router_dtype": "float64"},
        {"overflow": "next_expert", "capacity_factor": 1.0},
        {"overflow": "next_expert", "eval_capacity_factor": 1.0},
        {"pad_to_capacity": True, "capacity_factor": 1.0, "drop_priority": "position"},
        {"pad_to_capacity": True, "eval_capacity_factor": 1.0, "drop_priority": "random"},
        {"shared_expert_gate": True, "num_shared_experts": 1},
        {"residual": True},
        {"router": "switch", "top_k": 1},
        {"router": "gshard", "top_k": 2},
        {"router": "group_limited", "num_groups": 1, "topk_groups": 1, "top_k": 4},
        {"router": "group_limited", "num_groups": 4, "topk_groups": 4, "top_k": 4},
        {"router": "group_limited", "num_groups": 4, "topk_groups": 2, "top_k": 2},
        {"router": "expert_choice", "capacity_factor": 1e-3, "pad_to_capacity": True},
        {"router": "sinkhorn", "sinkhorn_tolerance": 1e-9, "sinkhorn_iterations": 1},
        {"router": "mine", "num_groups": 3},  # the user's router checks its own
    ],
    ids=str,
)
def test_the_limits_themselves_are_allowed(fields: dict[str, Any]) -> None:
    config = MoEConfig(**{"num_experts": 4, **fields})
    assert {name: getattr(config, name) for name in fields} == fields


def test_it_is_frozen() -> None:
    config = MoEConfig(num_experts=4)
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    assert hash(config) == hash(MoEConfig(num_experts=4))


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^top_k=3: must be from 1 to num_experts=2\."):
        dataclasses.replace(MoEConfig(num_experts=2), top_k=3)


def test_the_defaults_are_those_of_the_design() -> None:
    assert dataclasses.asdict(MoEConfig(num_experts=8)) == {
        "num_experts": 8,
        "top_k": 2,
        "intermediate_size": None,
        "activation": "swiglu",
        "router": "topk",
        "score_function": None,  # softmax, as resolved below
        "normalize_topk": True,
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "min_capacity": 4,
        "overflow": "drop",
        "drop_priority": "score",
        "dispatcher": "auto",
        "num_shared_experts": 0,
        "score_before_topk": True,
        "route_scale": 1.0,
        "expert_bias": None,
        "router_dtype": "float32",
        "jitter": None,
        "num_groups": 1,
        "topk_groups": 1,
        "sinkhorn_tolerance": 1e-3,
        "sinkhorn_iterations": 100,
        "pad_to_capacity": False,
        "shared_expert_gate": False,
        "residual": False,
        "overlap_chunks": 1,
        "dispatch_dtype": None,
    }
