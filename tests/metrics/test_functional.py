"""What the functions promise beside their values, which the metrics' tests have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moe import metrics
from lightning_moe.metrics import functional as F


def on_meta(shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """Has no values: whatever asks for one raises, as it would wait for an accelerator."""
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_tensor_without_values_finds_whoever_waits() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(on_meta(()).sum() > 0)


@pytest.mark.parametrize("num_experts_L", [None, on_meta((3,))])
def test_functions_wait_for_no_device(num_experts_L: Tensor | None) -> None:
    counts_LE, probs_TE = on_meta((3, 4)), on_meta((5, 4), torch.float32)
    ids_TK, mask_TK, valid_T = on_meta((5, 2)), on_meta((5, 2), torch.bool), on_meta((5,), torch.bool)
    for function in (F.load_imbalance, F.load_cv, F.dead_experts):
        value_L = function(counts_LE, num_experts_L)
        assert value_L.shape == (3,)
        assert F.mean_over_layers(value_L, counts_LE.sum(1)).shape == ()
    assert F.router_entropy(probs_TE, valid_T).shape == ()
    assert F.router_entropy(probs_TE).shape == ()
    assert F.affinity(F.chosen_together(ids_TK, 4, F.is_assigned(ids_TK, mask_TK, valid_T))[None]).shape == (1, 4, 4)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", sorted({*metrics.__all__} - {"recording"}))
def test_metrics_wait_for_no_device(name: str, per_layer: bool) -> None:
    options = {} if name in ("ExpertLoad", "ExpertAffinity") else {"per_layer": per_layer}
    metric = getattr(metrics, name)([4, 3], **options).to("meta")
    for _ in range(2):
        inputs: dict[str, Any] = {
            "topk_ids_TK": on_meta((5, 2)),
            "placed_ids_TK": on_meta((5, 2)),
            "kept_TK": on_meta((5, 2), torch.bool),
            "assigned_TK": on_meta((5, 2), torch.bool),
            "probs_TE": on_meta((5, 3), torch.float32),
            "valid_T": on_meta((5,), torch.bool),
            "capacity": on_meta(()),
        }
        metric.update(**metric._filter_kwargs(**inputs, layer=1))
    assert metric.compute().device.type == "meta"


def test_one_expert_is_certain_and_even() -> None:
    assert F.router_entropy(torch.ones(3, 1)) == 0
    counts = torch.tensor([[5]])
    assert (F.load_imbalance(counts), F.load_cv(counts), F.dead_experts(counts)) == (1, 0, 0)


def test_padding_may_hold_anything() -> None:
    probs = torch.tensor([[0.5, 0.5], [float("nan"), float("inf")]])
    assert F.router_entropy(probs, torch.tensor([True, False])) == pytest.approx(1, rel=1e-6)  # in fp32
    assert F.router_entropy(probs, torch.tensor([False, False])) == 1  # nobody is there


def test_entropy_of_low_precision_is_taken_in_fp32() -> None:
    probs = torch.rand(7, 5).softmax(1)
    rounded = probs.bfloat16()
    expected = -(rounded.double() * rounded.double().log()).sum(1).mean() / torch.tensor(5.0).double().log()
    assert F.router_entropy(rounded) == pytest.approx(expected.item(), rel=1e-6)
