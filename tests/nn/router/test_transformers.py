"""Routers and the load-balancing loss against those of transformers, on the same weights.

Where theirs are something else:

- All: theirs order a token's experts by ``torch.topk``, which leaves ties and, with ``sorted=False``, the order open;
  ours are best first and the lower id among equals. Selections are compared as sets.
- Mixtral, Qwen3-MoE, OLMoE and gpt-oss compute the logits in the precision of the activations, and ours in fp32 or
  float64: they agree on fp32. Qwen3-MoE, OLMoE and gpt-oss round the weights to it as well.
- Mixtral's jitter is drawn afresh and changes what the experts see, too; ours changes what the router sees.
- gpt-oss adds a learned bias to the logits, for selection and weights. Ours has none: its ``expert_bias`` is for the
  selection alone, is no parameter, and the two agree where the bias is 0.
- DeepSeek-V3 adds 1e-20 to the sum that weights are divided by; ours takes 1e-20 as its lower bound.
- DeepSeek-V2 rates a group by its best expert, ours by its two best together (as V3). They agree where the groups that
  are kept do. DeepSeek-V2 as it is in transformers never divides by the sum.
- ``load_balancing_loss_func`` is the sum over the ``top_k`` choices, ours their mean: theirs is ``top_k`` times ours.
  Over several layers it pools their tokens, so that imbalances of layers may cancel; ours is taken layer by layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_moe import MoEConfig
from lightning_moe.nn import Routing, load_balancing_loss
from lightning_moe.nn.router import make_router
from tests.nn.router.helpers import as_dicts, assert_same_routes, route, tokens_of

D, E, T = 12, 8, 200


def routed(config: MoEConfig, weight_ED: Tensor, x_TD: Tensor, bias_E: Tensor | None = None) -> Routing:
    router = make_router(D, config)
    state = {"weight": weight_ED} if bias_E is None else {"weight": weight_ED, "expert_bias": bias_E}
    router.load_state_dict(state)
    return router(x_TD, tokens_of(len(x_TD)))


def with_weights(module: torch.nn.Module) -> tuple[torch.nn.Module, Tensor]:
    weight_ED = torch.randn(E, D)
    with torch.no_grad():
        module.weight.copy_(weight_ED)
    return module, weight_ED


def assert_as_by(theirs: torch.nn.Module, ours: Routing, x_TD: Tensor) -> None:
    logits_TE, weights_TK, ids_TK = theirs(x_TD)
    assert_close(ours.logits_TE, logits_TE, rtol=1e-6, atol=1e-6)
    assert_same_routes(as_dicts(ours.topk_ids_TK, ours.topk_scores_TK), as_dicts(ids_TK, weights_TK))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_mixtral(top_k: int) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    theirs, weight = with_weights(
        MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=top_k))
    )
    x = torch.randn(T, D)
    assert_as_by(theirs, routed(MoEConfig(E, top_k=top_k), weight, x), x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_qwen3_moe_and_olmoe(family: str, top_k: int, normalize: bool) -> None:
    from transformers import OlmoeConfig, Qwen3MoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config, router = {
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeTopKRouter),
        "olmoe": (OlmoeConfig, OlmoeTopKRouter),
    }[family]
    settings: dict[str, Any] = {"num_experts_per_tok": top_k, "norm_topk_prob": normalize}
    theirs, weight = with_weights(router(config(hidden_size=D, num_experts=E, **settings)))
    x = torch.randn(T, D)
    assert_as_by(theirs, routed(MoEConfig(E, top_k=top_k, normalize_topk=normalize), weight, x), x)


@pytest.mark.parametrize("top_k", [1, 4])
def test_gpt_oss(top_k: int) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    theirs, weight = with_weights(
        GptOssTopKRouter(GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=top_k))
    )
    x = torch.randn(T, D)
    config = MoEConfig(E, top_k=top_k, score_before_topk=False, normalize_topk=False)
    assert_as_by(theirs, routed(config, weight, x), x)
    # A softmax over the selected sums to 1 already.
    assert_as_by(theirs, routed(MoEConfig(E, top_k=top_k, score_before_topk=False), weight, x), x)
    # As long as its bias is 0.
    with torch.no_grad():
        theirs.bias.copy_(torch.randn(E))
    assert not torch.equal(theirs(x)[0], routed(config, weight, x).logits_TE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("top_k", "groups", "topk_groups", "scale", "spread"),
    [(2, 4, 2, 2.5, 0.3), (4, 2, 1, 1.0, 0.3), (3, 4, 3, 16.0, 3.0), (2, 1, 1, 2.5, 0.3), (1, 2, 2, 1.0, 0.0)],
)
def test_deepseek_v3(top_k: int, groups: int, topk_groups: int, scale: float, spread: float, normalize: bool) -> None:
    theirs, weight = with_weights(deepseek_v3(top_k, groups, topk_groups, scale, normalize))
    bias = spread * torch.randn(E)
    with torch.no_grad():
        theirs.e_score_correction_bias.copy_(bias)
    x = torch.randn(T, D)
    config = MoEConfig(
        E,
        top_k=top_k,
        router="group_limited",
        num_groups=groups,
        topk_groups=topk_groups,
        route_scale=scale,
        normalize_topk=normalize,
    )
    assert_as_by(theirs, routed(config, weight, x, bias), x)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("expert_bias", [True, False])
def test_one_group_of_deepseek_v3_is_topk_with_sigmoid(expert_bias: bool, normalize: bool) -> None:
    theirs, weight = with_weights(deepseek_v3(3, 1, 1, 2.5, normalize))
    bias = 0.3 * torch.randn(E) if expert_bias else None
    if bias is not None:
        with torch.no_grad():
            theirs.e_score_correction_bias.copy_(bias)
    x = torch.randn(T, D)
    config = MoEConfig(
        E, top_k=3, score_function="sigmoid", expert_bias=expert_bias, route_scale=2.5, normalize_topk=normalize
    )
    assert_as_by(theirs, routed(config, weight, x, bias), x)


def test_deepseek_v3_without_a_bias_rates_groups_by_scores() -> None:
    """As with a bias of 0: a sum of two logits is no measure of a sum of two scores."""
    theirs, weight = with_weights(deepseek_v3(2, 4, 2, 1.0, normalize=True))
    x = torch.randn(T, D)
    groups: dict[str, Any] = {"router": "group_limited", "num_groups": 4, "topk_groups": 2}
    assert_as_by(theirs, routed(MoEConfig(E, top_k=2, expert_bias=False, **groups), weight, x), x)


def deepseek_v3(top_k: int, groups: int, topk_groups: int, scale: float, normalize: bool) -> torch.nn.Module:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    return DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D,
            n_routed_experts=E,
            num_local_experts=E,
            num_experts_per_tok=top_k,
            n_group=groups,
            topk_group=topk_groups,
            routed_scaling_factor=scale,
            norm_topk_prob=normalize,
        )
    )


def deepseek_v2(top_k: int, method: str, groups: int = 1, topk_groups: int = 1) -> torch.nn.Module:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    return DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=D,
            num_attention_heads=1,
            n_routed_experts=E,
            num_experts_per_tok=top_k,
            topk_method=method,
            n_group=groups,
            topk_group=topk_groups,
            routed_scaling_factor=1.5,
        )
    )


def test_deepseek_v2_greedy_is_topk() -> None:
    theirs, weight = with_weights(deepseek_v2(3, "greedy"))
    x = torch.randn(T, D)
    assert_as_by(theirs, routed(MoEConfig(E, top_k=3, normalize_topk=False, route_scale=1.5), weight, x), x)


def test_deepseek_v2_agrees_where_the_groups_do() -> None:
    theirs, weight = with_weights(deepseek_v2(2, "group_limited_greedy", groups=4, topk_groups=2))
    x = torch.randn(T, D)
    config = MoEConfig(
        E,
        top_k=2,
        router="group_limited",
        score_function="softmax",
        num_groups=4,
        topk_groups=2,
        normalize_topk=False,
        route_scale=1.5,
    )
    scores_TGE = (x @ weight.t()).softmax(-1).view(T, 4, 2)
    by_best, by_sum = (score.topk(2).indices.sort(-1).values for score in (scores_TGE.amax(-1), scores_TGE.sum(-1)))
    same_T = (by_best == by_sum).all(-1)
    assert 0.5 * T < same_T.sum() < T
    assert_as_by(theirs, routed(config, weight, x[same_T], torch.zeros(E)), x[same_T])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss(top_k: int, masked: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = 2 * torch.randn(6 * 10, E)
    mask = torch.rand(6, 10) < 0.7 if masked else None
    theirs = load_balancing_loss_func((logits,), E, top_k, None if mask is None else mask.long())
    ours = our_loss(logits, top_k, None if mask is None else mask.reshape(-1))
    assert_close(theirs, top_k * ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_over_layers_is_that_of_their_tokens_together(masked: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = tuple(2 * torch.randn(6 * 10, E) + 2 * torch.randn(E) for _ in range(3))
    mask = torch.rand(6, 10) < 0.7 if masked else None
    valid = None if mask is None else mask.reshape(-1).repeat(3)
    theirs = load_balancing_loss_func(layers, E, 2, mask)
    assert_close(theirs, 2 * our_loss(torch.cat(layers), 2, valid), rtol=1e-6, atol=1e-6)
    # Layer by layer is something else: a preference of one does not make up for that of another.
    one_mask = None if mask is None else mask.reshape(-1)
    by_layer = torch.stack([our_loss(logits, 2, one_mask) for logits in layers]).mean()
    assert theirs / 2 < by_layer - 0.1


def our_loss(logits: Tensor, top_k: int, valid: Tensor | None) -> Tensor:
    routing = route(MoEConfig(E, top_k=top_k), logits, tokens_of(len(logits), valid=valid))
    return load_balancing_loss(routing.scores_TE, routing.topk_ids_TK, routing.assigned_TK, valid)
