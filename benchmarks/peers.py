"""The layer, the dense limit and other people's MoE layers, all with the same weights, for the scripts beside it.

Every layer is ``y = sum over the top-k of g_i * E_i(x)`` with a softmax router, weights normalised over the top-k and
SwiGLU experts, from [1, T, D] to [1, T, D].

Shapes: T tokens, D width, F expert width, E experts, K experts per token.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from timing import Pass
from torch import Tensor, nn
from torch.nn import functional

from lightning_moe import MoE, MoEConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and how many tokens it gets."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, hidden {self.hidden}, ffn {self.ffn}, {self.experts} experts, top-{self.top_k}"

    @property
    def rows(self) -> int:
        """Assignments: what the experts together compute, and the dense limit too."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of forward and backward of the experts: three products of two operations each, and twice that back."""
        return 18 * self.rows * self.hidden * self.ffn


SHAPES = {
    "S1": Shape(2048, 256, 512, 8, 2),
    "S2": Shape(4096, 512, 1024, 16, 2),
    "S3": Shape(4096, 512, 256, 64, 8),
    "GPU": Shape(16384, 2048, 1024, 64, 8),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = "lightning-moe"
LIMITS = ("dense, fused gate-up", "dense, separate")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""Relative error of a result; in bf16 some routers round their logits, which sends some tokens to other experts."""


class Unavailable(RuntimeError):  # noqa: N818
    """This peer cannot run here; the message says why."""


class Weights(NamedTuple):
    """A layer's weights, or their gradients: router [E, D], w1 [E, 2F, D] with the gate above up, w2 [E, D, F]."""

    router: Tensor
    w1: Tensor
    w2: Tensor


Parts = list[tuple[nn.Parameter, str, Any]]
"""Parameters of a candidate: each with the name of the :class:`Weights` that it holds and the index of its part."""


@dataclass(frozen=True)
class Builder:
    """How to make one candidate.

    Args:
        make: From the weights and the shape to the module.
        parts: What its parameters hold; ``None`` where that is not the layer's weights.
        drops: Whether it may leave assignments out, so that its result is not that of the others.
    """

    make: Callable[[Weights, Shape], nn.Module]
    parts: Callable[[Any], Parts] | None = None
    drops: bool = False


class Problem:
    """Weights, input and upstream gradient that all candidates of a shape share, random from a fixed seed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        E, D, F = shape.experts, shape.hidden, shape.ffn

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator).mul_(std).to(device, dtype)

        self.shape, self.dtype, self.device = shape, dtype, device
        self.weights = Weights(normal(E, D, std=0.02), normal(E, 2 * F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5))
        self.x = normal(1, shape.tokens, D)
        self.upstream = normal(1, shape.tokens, D)

    def tokens_per_expert(self) -> Tensor:
        """How unevenly these weights route these tokens, [E]."""
        logits_TE = functional.linear(self.x[0].float(), self.weights.router.float())
        return logits_TE.topk(self.shape.top_k).indices.flatten().bincount(minlength=self.shape.experts)

    def load_imbalance(self) -> float:
        """Largest over mean tokens per expert."""
        counts_E = self.tokens_per_expert()
        return float(counts_E.max() / counts_E.float().mean())

    def build(self, name: str) -> Pass:
        """One candidate; the two limits get an input of their own, a row per assignment.

        Raises:
            Unavailable: it cannot run here.
        """
        builder = CANDIDATES[name]
        try:
            module = builder.make(self.weights, self.shape).to(self.device, self.dtype).train()
        except ImportError as error:
            raise Unavailable(f"not installed: {error}") from error
        x, upstream = self.x, self.upstream
        if name in LIMITS:
            x, upstream = (t.repeat(1, self.shape.top_k, 1) for t in (x, upstream))
        return Pass(module, x.clone().requires_grad_(), upstream.clone())


class Reference:
    """The result that candidates are held against: a loop over the experts in fp32, written out."""

    def __init__(self, problem: Problem) -> None:
        x_TD = problem.x[0].float().requires_grad_()
        weights = Weights(*(weight.float().clone().requires_grad_() for weight in problem.weights))
        scores_TE = functional.linear(x_TD, weights.router).softmax(-1)
        topk_scores_TK, topk_ids_TK = scores_TE.topk(problem.shape.top_k)
        topk_scores_TK = topk_scores_TK / topk_scores_TK.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        # unbind: indexing would make a gradient of the size of all experts for each of them.
        for expert, (w1, w2) in enumerate(zip(weights.w1.unbind(), weights.w2.unbind(), strict=True)):
            token_R, place_R = (topk_ids_TK == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(x_TD[token_R], w1).chunk(2, dim=-1)
            rows_RD = functional.linear(functional.silu(gate) * up, w2)
            y_TD = y_TD.index_add(0, token_R, rows_RD * topk_scores_TK[token_R, place_R, None])
        y_TD.backward(problem.upstream[0].float())
        assert x_TD.grad is not None
        self.y_TD, self.x_grad_TD = y_TD.detach(), x_TD.grad
        self.gradients = Weights(*(weight.grad for weight in weights))  # type: ignore[arg-type]

    def error(self, candidate: Pass, name: str) -> float:
        """Largest relative error of its output and of its gradients of input, router, w1 and w2; runs it once.

        Raises:
            Unavailable: as for :func:`attempt`, or it is further from the reference than its dtype explains.
        """
        builder = CANDIDATES[name]
        y = attempt(candidate)
        assert candidate.x.grad is not None
        if builder.parts is None:
            return 0.0
        errors = [_relative([(y[0], self.y_TD)]), _relative([(candidate.x.grad[0], self.x_grad_TD)])]
        parts = builder.parts(candidate.module)
        for field in Weights._fields:
            wanted = getattr(self.gradients, field)
            errors.append(_relative([(part.grad, wanted[index]) for part, of, index in parts if of == field]))
        candidate.clear()
        if not max(errors) < TOLERANCE[y.dtype] and not builder.drops:
            raise Unavailable(f"computes something else: relative error {max(errors):.1e}")
        return max(errors)


def attempt(candidate: Pass) -> Tensor:
    """Runs a candidate for the first time; returns its output and leaves the gradients.

    Raises:
        Unavailable: it fails, or has no gradient somewhere.
    """
    candidate.clear()
    try:
        y = candidate.module(candidate.x)
        y.backward(candidate.upstream)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise Unavailable(f"fails: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    without = [key for key, parameter in candidate.module.named_parameters() if parameter.grad is None]
    if without or candidate.x.grad is None:
        raise Unavailable(f"no gradient for {', '.join(without) or 'the input'}")
    return y.detach()


def _relative(pairs: list[tuple[Any, Tensor]]) -> float:
    """Norm of the differences over the norm of what is wanted."""
    off = sum(float((found.float() - wanted).square().sum()) for found, wanted in pairs)
    return (off / sum(float(wanted.square().sum()) for _, wanted in pairs)) ** 0.5


class DenseFused(nn.Module):
    """Llama's feed-forward block, with gate and up in one product."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w1 = nn.Parameter(w1.clone())
        self.w2 = nn.Parameter(w2.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = functional.linear(x, self.w1).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.w2)


class DenseSeparate(nn.Module):
    """Llama's feed-forward block as written there."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        gate, up = w1.chunk(2)
        self.gate, self.up, self.w2 = nn.Parameter(gate.clone()), nn.Parameter(up.clone()), nn.Parameter(w2.clone())

    def forward(self, x: Tensor) -> Tensor:
        h = functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(h, self.w2)


def make_dense(block: type[nn.Module], weights: Weights, shape: Shape) -> nn.Module:
    """The limit: one expert."""
    return block(weights.w1[0], weights.w2[0])


def make_ours(weights: Weights, shape: Shape) -> nn.Module:
    """The layer of this package, with default settings."""
    warnings.filterwarnings("ignore", message=".*no AuxLossCallback.*")
    config = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, intermediate_size=shape.ffn)
    with weights.w1.device:
        layer = MoE(shape.hidden, config)
    return _load(layer.to(weights.w1), weights, _parts_of_ours)


def make_transformers(family: str, implementation: str, weights: Weights, shape: Shape) -> nn.Module:
    """A block of transformers."""
    gathered = shape.rows * weights.w1[0].nbytes
    if implementation == "batched_mm" and gathered > 2**30:
        raise Unavailable(f"would gather {gathered / 2**30:.1f} GiB: the weights of w1 once for every assignment")
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_experts_per_tok": shape.top_k,
        "experts_implementation": implementation,
    }
    if family == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

        mixtral = MixtralConfig(num_local_experts=shape.experts, intermediate_size=shape.ffn, **sizes)
        block: nn.Module = MixtralSparseMoeBlock(mixtral)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

        qwen = Qwen3MoeConfig(num_experts=shape.experts, moe_intermediate_size=shape.ffn, norm_topk_prob=True, **sizes)
        block = Qwen3MoeSparseMoeBlock(qwen)
    return _load(block.to(weights.w1), weights, _parts_of_transformers)


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's layer without the loss and the counts it returns beside the output."""

    def __init__(self, weights: Weights, shape: Shape, drops: bool) -> None:
        super().__init__()
        _prepare_deepspeed()
        from deepspeed.moe.layer import MoE as DeepSpeedMoE

        self.moe = DeepSpeedMoE(
            shape.hidden,
            DenseFused(weights.w1[0], weights.w2[0]),
            num_experts=shape.experts,
            k=shape.top_k,
            capacity_factor=1.25,
            drop_tokens=drops,
            top2_2nd_expert_sampling=False,  # the others do not draw their second expert either
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


def make_deepspeed(drops: bool, weights: Weights, shape: Shape) -> nn.Module:
    """``deepspeed.moe.layer.MoE``."""
    return _load(DeepSpeedLayer(weights, shape, drops).to(weights.w1), weights, _parts_of_deepspeed)


def make_autoep(options: dict[str, Any], weights: Weights, shape: Shape) -> nn.Module:
    """The layer that DeepSpeed's AutoEP puts in the place of a Mixtral block, with its own router and padding."""
    _prepare_deepspeed()
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    # Built here rather than by AutoEP's detection, which stops with a TypeError at transformers 5.23.
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    source = make_transformers("mixtral", "eager", weights, shape)
    return AutoEPMoELayer(spec, source, ep_size=1, ep_rank=0, config=AutoEPConfig(**options))


class AutoEPExperts(nn.Module):
    """AutoEP's experts alone, behind the shortest router there is: no padding between experts."""

    def __init__(self, weights: Weights, shape: Shape, options: dict[str, Any]) -> None:
        super().__init__()
        _prepare_deepspeed()
        from deepspeed.moe.ep_experts import GroupedExperts

        self.top_k = shape.top_k
        self.router = nn.Parameter(weights.router.clone())
        self.experts = GroupedExperts(shape.hidden, shape.ffn, shape.experts, **options)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        scores_TE = functional.linear(x_TD, self.router).float().softmax(-1)
        topk_scores_TK, topk_ids_TK = scores_TE.topk(self.top_k)
        topk_scores_TK = topk_scores_TK / topk_scores_TK.sum(-1, keepdim=True)
        order_N = topk_ids_TK.flatten().argsort(stable=True)
        counts_E = topk_ids_TK.flatten().bincount(minlength=len(self.router))
        y_ND = self.experts(x_TD[order_N // self.top_k], counts_E)
        y_ND = y_ND * topk_scores_TK.flatten()[order_N, None]
        return torch.zeros_like(x_TD).index_add(0, order_N // self.top_k, y_ND.to(x.dtype)).view_as(x)


def make_autoep_experts(options: dict[str, Any], weights: Weights, shape: Shape) -> nn.Module:
    """AutoEP's experts behind a plain router."""
    return _load(AutoEPExperts(weights, shape, options).to(weights.w1), weights, _parts_of_autoep_experts)


def _prepare_deepspeed() -> None:
    from lightning_moe.engine.deepspeed import prepare_import

    prepare_import()
    import deepspeed  # noqa: F401

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _load(module: nn.Module, weights: Weights, parts: Callable[[Any], Parts]) -> nn.Module:
    with torch.no_grad():
        for parameter, of, index in parts(module):
            parameter.copy_(getattr(weights, of)[index])
    return module


def _parts_of_ours(layer: Any) -> Parts:
    return [(layer.router.weight, "router", ...), (layer.experts.w1, "w1", ...), (layer.experts.w2, "w2", ...)]


def _parts_of_transformers(block: Any) -> Parts:
    experts = block.experts
    return [(block.gate.weight, "router", ...), (experts.gate_up_proj, "w1", ...), (experts.down_proj, "w2", ...)]


def _parts_of_deepspeed(layer: Any) -> Parts:
    parts: Parts = [(layer.moe.deepspeed_moe.gate.wg.weight, "router", ...)]
    for number, expert in enumerate(layer.moe.deepspeed_moe.experts.deepspeed_experts):
        parts += [(expert.w1, "w1", number), (expert.w2, "w2", number)]
    return parts


def _parts_of_autoep(layer: Any) -> Parts:
    return [(layer.router.gate.weight, "router", ...), *_parts_of_grouped(layer.experts)]


def _parts_of_autoep_experts(layer: Any) -> Parts:
    return [(layer.router, "router", ...), *_parts_of_grouped(layer.experts)]


def _parts_of_grouped(experts: Any) -> Parts:
    F = experts.w2.shape[-1]
    gate, up = (slice(None), slice(F)), (slice(None), slice(F, None))
    return [(experts.w1, "w1", gate), (experts.w3, "w1", up), (experts.w2, "w2", ...)]


def _of_transformers(family: str, implementation: str) -> Builder:
    return Builder(partial(make_transformers, family, implementation), _parts_of_transformers)


CANDIDATES: dict[str, Builder] = {
    OURS: Builder(make_ours, _parts_of_ours),
    LIMITS[0]: Builder(partial(make_dense, DenseFused)),
    LIMITS[1]: Builder(partial(make_dense, DenseSeparate)),
    "Mixtral, eager": _of_transformers("mixtral", "eager"),
    "Mixtral, grouped_mm": _of_transformers("mixtral", "grouped_mm"),
    "Mixtral, batched_mm": _of_transformers("mixtral", "batched_mm"),
    "Qwen3-MoE, eager": _of_transformers("qwen3", "eager"),
    "Qwen3-MoE, grouped_mm": _of_transformers("qwen3", "grouped_mm"),
    "Qwen3-MoE, batched_mm": _of_transformers("qwen3", "batched_mm"),
    "DeepSpeed MoE, dropping": Builder(partial(make_deepspeed, True), _parts_of_deepspeed, drops=True),
    "DeepSpeed MoE, no dropping": Builder(partial(make_deepspeed, False), _parts_of_deepspeed),
    "AutoEP layer, loop": Builder(partial(make_autoep, {"use_grouped_mm": False}), _parts_of_autoep),
    "AutoEP layer, grouped_mm": Builder(partial(make_autoep, {}), _parts_of_autoep),
    "AutoEP layer, fused gate-up": Builder(partial(make_autoep, {"gate_up_impl": "fused"}), _parts_of_autoep),
    "AutoEP experts, loop": Builder(partial(make_autoep_experts, {"use_grouped_mm": False}), _parts_of_autoep_experts),
    "AutoEP experts, grouped_mm": Builder(partial(make_autoep_experts, {}), _parts_of_autoep_experts),
    "AutoEP experts, fused gate-up": Builder(
        partial(make_autoep_experts, {"gate_up_impl": "fused"}), _parts_of_autoep_experts
    ),
}
"""Everything that can be timed, ours and the two limits first."""

PEERS = tuple(name for name in CANDIDATES if name != OURS and name not in LIMITS)
