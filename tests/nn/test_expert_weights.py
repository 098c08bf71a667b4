"""The experts' weights: how they start, and which of them a rank has, in every layout."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_moe import MoE, MoEConfig
from lightning_moe.nn import GroupedExperts
from lightning_moe.parallel import (
    SINGLE_RANK,
    ExpertGroups,
    building_for,
    expert_group_name,
    is_expert_parameter,
)
from tests.nn.test_experts import forward, looped, make

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers are trained with no AuxLossCallback")


def test_weights_depend_on_seed_and_expert_only() -> None:
    whole = make()
    halves = [make(groups=ExpertGroups(ep_size=2, ep_rank=rank)) for rank in range(2)]
    assert [list(half.expert_ids) for half in halves] == [[0, 1], [2, 3]]
    for name in ("w1", "w2"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
        assert torch.equal(getattr(halves[1], name), getattr(whole, name)[2:])
    # Nor on how many others there are.
    torch.manual_seed(7)
    more = GroupedExperts(8, 12, 16, "swiglu", SINGLE_RANK)
    assert torch.equal(more.w1[:4], whole.w1)


def test_another_seed_gives_other_weights() -> None:
    first = make()
    second = GroupedExperts(8, 12, 4, "swiglu", SINGLE_RANK)  # the next layer of the same model
    assert first.seed != second.seed
    every = [*first.w1, *second.w1]
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_all_experts_differ() -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(8, 4, 64, "gelu", SINGLE_RANK)
    for weight in (experts.w1, experts.w2):
        assert len({tuple(w.flatten().tolist()) for w in weight}) == 64


def test_they_start_as_linear_layers_do() -> None:
    experts = GroupedExperts(64, 16, 8, "relu", SINGLE_RANK)
    for weight in (experts.w1, experts.w2):
        bound = 1 / math.sqrt(weight.shape[-1])
        assert float(weight.detach().abs().max()) <= bound
        assert_close(weight.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)
        assert_close(weight.mean().item(), 0.0, rtol=0, atol=0.02 * bound)


def test_the_default_generator_advances_equally_in_every_layout() -> None:
    states = []
    layouts = [SINGLE_RANK, *(ExpertGroups(ep, rank) for ep in (2, 4) for rank in range(ep))]
    for groups in layouts:
        make(groups=groups)
        states.append(torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in pairwise(states))


def test_reset_gives_the_same_again() -> None:
    experts = make()
    before = copy.deepcopy(experts.state_dict())
    nn.init.zeros_(experts.w1)
    experts.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())


def test_bf16_starts_at_the_rounded_fp32_weights() -> None:
    fp32 = make()
    torch.set_default_dtype(torch.bfloat16)
    try:
        bf16 = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bf16.w1, fp32.w1.bfloat16())


def test_meta_device_draws_the_same_seed_and_no_weights() -> None:
    seed = make().seed
    with torch.device("meta"):
        experts = make()
    assert experts.w1.is_meta
    assert experts.seed == seed


def test_shard_keeps_the_parameters_and_frees_the_rest() -> None:
    experts = make()
    parameters = dict(experts.named_parameters())
    whole = {name: value.detach().clone() for name, value in parameters.items()}
    experts.shard_(ExpertGroups(ep_size=2, ep_rank=1))
    assert list(experts.expert_ids) == [2, 3]
    for name, value in experts.named_parameters():
        assert value is parameters[name]  # an optimizer that holds it goes on with it
        assert torch.equal(value, whole[name][2:])
        assert value.untyped_storage().nbytes() == whole[name].untyped_storage().nbytes() // 2
    x = torch.randn(3, 8)
    expected = looped(x.double(), whole["w1"].double()[2:], whole["w2"].double()[2:], [1, 2], "swiglu")
    assert_close(forward(experts, x, [1, 2]).double(), expected, rtol=1e-6, atol=1e-6)


def test_wrong_numbers_are_refused() -> None:
    message = (
        "num_experts=4: must be divisible by expert_parallel_size=3. Use 6 experts, or another expert_parallel_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(groups=ExpertGroups(ep_size=3))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().shard_(ExpertGroups(ep_size=3))


def test_marks_and_the_hook() -> None:
    seen: list[nn.Parameter] = []
    experts = make(groups=ExpertGroups(ep_size=2, on_expert_parameter=seen.append))
    assert [id(p) for p in seen] == [id(p) for p in experts.parameters()]
    assert all(is_expert_parameter(p) and expert_group_name(p) == "ep_size_2" for p in experts.parameters())
    assert not is_expert_parameter(nn.Parameter(torch.zeros(1)))


def test_copies_are_independent() -> None:
    experts = make(groups=ExpertGroups(ep_size=2, ep_rank=1))
    twin = copy.deepcopy(experts)
    x = torch.randn(3, 8)
    assert torch.equal(forward(twin, x, [1, 2]), forward(experts, x, [1, 2]))
    with torch.no_grad():
        twin.w1.zero_()
    assert experts.w1.any()
    assert (twin.expert_ids, twin.seed) == (experts.expert_ids, experts.seed)


def test_repr_shows_which_experts_are_here() -> None:
    experts = make(groups=ExpertGroups(ep_size=2, ep_rank=1))
    assert repr(experts) == "GroupedExperts(experts 2-3 of 4, activation=swiglu)"


def test_experts_of_a_layer_are_those_of_the_scope() -> None:
    with building_for(ExpertGroups(ep_size=4, ep_rank=2, ep_group=object())):  # type: ignore[arg-type]
        moe = MoE(8, MoEConfig(num_experts=8))
    assert list(moe.experts.expert_ids) == [4, 5]
    assert (moe.num_experts, moe.num_local_experts) == (8, 2)
