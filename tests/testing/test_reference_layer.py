"""The plain-loop layer against the fast one: every router, overflow and scope, on random inputs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn.tap import LossWeights, RoutingStats
from lightning_moe.parallel import ExpertGroups
from lightning_moe.testing.reference import ReferenceMoE

LN3, LN7 = math.log(3), math.log(7)


# --- the real layer ---------------------------------------------------------------------------------------------------

ROUTER_CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 2},
    "switch": {"top_k": 1, "jitter": 0.3},
    "gshard": {"top_k": 2},
    "noisy_topk": {"top_k": 2, "jitter": 0.3},
    "sinkhorn": {"top_k": 2},
    "expert_choice": {},
    "group_limited": {"top_k": 2, "num_groups": 3, "topk_groups": 2, "route_scale": 2.5},
    "hash": {"top_k": 2},
    "random": {"top_k": 2},
}
LOSSES = LossWeights(load_balancing=0.3, router_z=0.02, importance=0.2, load=0.1)
D = 5


def real(router: str, **changes: Any) -> MoE:
    torch.manual_seed(1)
    config = {"intermediate_size": 6, "capacity_factor": 1.0, "eval_capacity_factor": 0.9, "min_capacity": 1, **changes}
    moe = MoE(D, MoEConfig(6, router=router, **ROUTER_CONFIGS[router], **config))
    for parameter in moe.router.parameters():
        nn.init.normal_(parameter)  # far apart, so that fp32 and float64 choose the same
    if router == "group_limited":
        cast(Tensor, moe.router.expert_bias).normal_()
    return moe


def against_the_reference(moe: MoE, valid: Tensor | None, scope: str = "micro_batch", ranks: int = 1) -> Counter[str]:
    """Outputs, gradients, losses and counters of two micro-batches of 2 sequences per rank; returns sums of those."""
    counts: Counter[str] = Counter()
    reference = ReferenceMoE(moe, ranks).train(moe.training)
    stats: list[RoutingStats] = []
    moe.tap.observers.append(stats.append)
    moe.tap.loss_weights = LOSSES
    moe.tap.importance = moe.tap.load = True
    moe.tap.scope, reference.scope = cast(Any, scope), scope
    for seed in (2, 3):
        x = torch.randn(2 * ranks, 7, D, requires_grad=True)
        upstream, ids = torch.randn(2 * ranks, 7, D), torch.randint(50, (2 * ranks, 7))
        outputs = []
        for rank in range(ranks):
            part = slice(2 * rank, 2 * rank + 2)
            moe.groups = ExpertGroups(data_size=ranks, data_rank=rank)
            torch.manual_seed(seed)
            y = moe(x[part], None if valid is None else valid[part], ids[part])
            y.backward(upstream[part])
            outputs.append(y.detach())
        state = torch.get_rng_state()

        x64 = x.detach().double().requires_grad_()
        torch.manual_seed(seed)
        y64 = reference(x64, valid, ids)
        assert torch.equal(torch.get_rng_state(), state)
        counts.update(num_dropped=reference.num_dropped, num_rerouted=reference.num_rerouted)
        objective = (y64 * upstream).sum()
        if moe.training:
            objective = objective + sum(w * ranks * reference.losses[name] for name, w in LOSSES._asdict().items())
            seen, stats[:] = stats[-ranks:], []
            for name, value in reference.losses.items():
                by_rank = [getattr(s, f"{name}_loss").double() for s in seen]
                assert_close(sum(by_rank) / ranks, value.detach(), rtol=1e-5, atol=1e-6, msg=name)
            assert sum(s.tokens_per_expert_E for s in seen).tolist() == reference.tokens_per_expert_E.tolist()
            assert sum(int(s.num_dropped) for s in seen) == reference.num_dropped
            assert sum(int(s.num_rerouted) for s in seen) == reference.num_rerouted
        objective.backward()
        assert_close(torch.cat(outputs).double(), y64.detach(), rtol=1e-5, atol=1e-6)
        assert x.grad is not None
        assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)
    expected = dict(reference.named_parameters())
    assert {name for name, _ in moe.named_parameters()} == expected.keys()
    for name, parameter in moe.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        theirs = torch.zeros_like(expected[name]) if expected[name].grad is None else expected[name].grad
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6, msg=f"gradient of {name}")
    return counts


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("router", "overflow"),
    [(r, o) for r in ROUTER_CONFIGS for o in ("drop", "next_expert") if (r, o) != ("expert_choice", "next_expert")],
)
def test_the_real_layer_agrees(router: str, overflow: str, training: bool, masked: bool) -> None:
    moe = real(router, overflow=overflow).train(training)
    valid = torch.rand(2, 7) < 0.7 if masked else None
    counts = against_the_reference(moe, valid)
    if router != "expert_choice":  # the capacity is put to the test
        assert counts["num_rerouted" if overflow == "next_expert" else "num_dropped"]


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
@pytest.mark.parametrize("router", ROUTER_CONFIGS)
def test_the_real_layer_agrees_on_scopes(router: str, scope: str) -> None:
    moe = real(router)
    against_the_reference(moe, torch.rand(2, 7) < 0.7, scope)


@pytest.mark.parametrize("router", ["topk", "switch", "gshard", "noisy_topk", "random"])
def test_shares_draw_as_ranks_do(router: str) -> None:
    moe = real(router, drop_priority="random", overflow="next_expert")
    against_the_reference(moe, torch.rand(6, 7) < 0.8, ranks=3)
