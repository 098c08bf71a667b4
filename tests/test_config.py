"""Every wrong field is refused by its name, value, rule and remedy, word for word."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from lightning_moe import MoEConfig

FACTOR_RULE = "must be a finite number above 0. Use 1.25, or null to drop nothing."


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
        ({"score_function": "sigmoid"}, "score_function='sigmoid': unknown. Known: softmax."),
        ({"overflow": "next"}, "overflow='next': unknown. Known: drop."),
        ({"drop_priority": "random"}, "drop_priority='random': unknown. Known: score."),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MoEConfig(**{"num_experts": 4, **fields})


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
        "score_function": "softmax",
        "normalize_topk": True,
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "min_capacity": 4,
        "overflow": "drop",
        "drop_priority": "score",
        "dispatcher": "auto",
        "num_shared_experts": 0,
    }
