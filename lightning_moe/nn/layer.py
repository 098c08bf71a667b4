"""The Mixture-of-Experts layer.

Shapes: T local tokens, D model width, K experts per token, R rows for this rank's experts.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_moe.config import MoEConfig
from lightning_moe.dispatch import Dispatcher, FixedShape, make_dispatcher, make_tuner
from lightning_moe.nn.decision import Decision
from lightning_moe.nn.dense import ResidualMLP, SharedMLP
from lightning_moe.nn.experts import GroupedExperts
from lightning_moe.nn.placing import place
from lightning_moe.nn.router import Router, Routing, make_router
from lightning_moe.nn.router.base import without_padding
from lightning_moe.nn.tap import RoutingTap
from lightning_moe.nn.tokens import Tokens
from lightning_moe.parallel import ExpertGroups, groups_in_scope
from lightning_moe.parallel.collectives import on_any_rank


class MoE(nn.Module):
    """A feed-forward block of routed experts: ``y = sum over the top-k of g_i * E_i(x)``.

    In ``configure_model`` under :class:`~lightning_moe.ExpertParallelStrategy` it makes only the experts of its
    rank. Anywhere else it makes them all: in a single process, under DDP or FSDP, or in ``__init__`` of a module
    that the strategy then shards at setup. The weights are the same either way.

    Two ranks, ``expert_parallel_size=2``, four experts, top-1; a token is a letter::

        rank      tokens   their experts     after dispatch       after combine
        0         a b c    2 0 3             experts 0, 1: b e    y(a) y(b) y(c)
        1         d e f    2 0 2             experts 2, 3: a d    y(d) y(e) y(f)
                                                           f c

    >>> _ = torch.manual_seed(0)
    >>> moe = MoE(hidden_size=8, config=MoEConfig(num_experts=4, top_k=2, intermediate_size=16))
    >>> moe(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])

    Args:
        hidden_size: D, the last dimension of the input.
        config: Everything else.
        causal: Whether a token must not know of later ones, as in a language model. The layer computes the same; it
            warns where its router looks ahead.

    Raises:
        ValueError: ``hidden_size`` is below 1, a name is unknown, or ``num_experts`` is not divisible by the
            expert_parallel_size.
    """

    def __init__(self, hidden_size: int, config: MoEConfig, *, causal: bool = False) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size}: must be at least 1. Use the width of the model.")
        self.hidden_size = hidden_size
        self.config = config = config.resolved()
        self.groups = groups_in_scope()
        self.tap = RoutingTap()
        intermediate_size = config.intermediate_size or 4 * hidden_size
        self._bind_dispatcher(self.groups)
        self.router: Router = make_router(hidden_size, config)
        self.experts = GroupedExperts(
            hidden_size, intermediate_size, config.num_experts, config.activation, self.groups
        )
        self.shared_mlp = (
            SharedMLP(
                hidden_size, config.num_shared_experts * intermediate_size, config.activation, config.shared_expert_gate
            )
            if config.num_shared_experts
            else None
        )
        self.residual = ResidualMLP(hidden_size, intermediate_size, config.activation) if config.residual else None
        self._warn_of_settings(causal)

    def _bind_dispatcher(self, groups: ExpertGroups) -> None:
        config = self.config
        wire_dtype = None if config.dispatch_dtype is None else getattr(torch, config.dispatch_dtype)
        self._dispatcher = make_dispatcher(config.dispatcher, config.num_experts, groups, wire_dtype)
        self.tuner = None
        if config.dispatcher == "tune":
            self.tuner = make_tuner(config.num_experts, groups, wire_dtype, config.overlap_chunks)
        # By mode and settings, both of which the capacity depends on: for the capture of a CUDA graph.
        self._agreed_shapes: dict[tuple[bool, MoEConfig], FixedShape] = {}

    @property
    def dispatcher(self) -> Dispatcher[Any]:
        """What moves tokens to their experts and back."""
        return self._dispatcher if self.tuner is None else self.tuner.current

    def _warn_of_settings(self, causal: bool) -> None:
        config = self.config
        reads_normalize = config.router in ("topk", "group_limited", "sinkhorn")
        is_constant = (reads_normalize and config.normalize_topk) or config.router == "noisy_topk"
        if config.top_k == 1 and config.num_experts > 1 and is_constant:
            remedy = "top_k=2" if config.router == "noisy_topk" else "normalize_topk=False, or router='switch',"
            warnings.warn(
                f"top_k=1: router={config.router!r} divides the one weight by itself, so that it learns from auxiliary "
                f"losses only. Use {remedy} to let it learn from the task.",
                stacklevel=3,
            )
        if causal and self.router.looks_ahead:
            _warn_of_looking_ahead(config.router)

    @property
    def num_experts(self) -> int:
        """Routed experts over all ranks."""
        return self.config.num_experts

    @property
    def num_local_experts(self) -> int:
        """Routed experts on this rank."""
        return len(self.experts.expert_ids)

    def shard_(self, groups: ExpertGroups) -> None:
        """Keeps only this rank's experts of a layer that was built whole, and binds it to these groups.

        Raises:
            ValueError: ``num_experts`` is not divisible by ``groups.ep_size``, or the layer is already sharded
                for another one.
        """
        if self.groups.ep_size not in (1, groups.ep_size):
            raise ValueError(
                f"expert_parallel_size={groups.ep_size}: this layer was built for {self.groups.ep_size}, and every "
                "layer of a model uses the same. Build the model anew for the new size."
            )
        if self.groups.ep_size != groups.ep_size:
            if hasattr(self.experts.w1, "ds_id"):
                raise ValueError(
                    f"expert_parallel_size={groups.ep_size}: ZeRO 3 has partitioned this layer's experts for "
                    f"{self.groups.ep_size} in an earlier run. Build the model anew for the new size."
                )
            self.experts.shard_(groups)
        self.experts.mark(groups)
        self._bind_dispatcher(groups)
        self.groups = groups

    # Dynamo can trace neither uneven collectives nor the tap, so that this is one graph break a layer.
    @torch.compiler.disable
    def forward(self, x: Tensor, valid: Tensor | None = None, token_ids: Tensor | None = None) -> Tensor:
        """Applies the layer, [..., D] -> [..., D], in the dtype of ``x``. Collective over the EP group.

        Args:
            x: Activations; the first dimension is the batch, the last but one a sequence.
            valid: False where a token is padding: it goes to no expert, comes out as 0 and counts nowhere. Shape [...].
            token_ids: Ids of the tokens in a vocabulary, for ``router="hash"``. Shape [...].
        """
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x has shape {list(x.shape)}: its last dimension must be hidden_size={self.hidden_size}. Build the "
                "layer for the width of the model."
            )
        x_TD = x.reshape(-1, self.hidden_size)
        tokens = Tokens(x.shape[:-1], valid, token_ids, self.groups, self.training, x.device)
        if tokens.valid_T is not None:
            x_TD = x_TD.masked_fill(~tokens.valid_T.unsqueeze(1), 0)  # no NaN of padding may come near a gradient
        x_TD = self._with_gradient_if_others_have(x_TD)
        chosen: Routing = without_padding(self.router(x_TD, tokens), tokens)
        dispatcher = self.dispatcher
        mode = self.training, self.config
        routing, shape = place(chosen, tokens, self.router, dispatcher, self._agreed_shapes.get(mode))
        if shape is not None:
            self._agreed_shapes[mode] = shape
        tie = self.tap.prepare(Decision(chosen, routing, tokens))
        routes = dispatcher.plan(routing.topk_ids_TK, routing.kept_TK, shape, self.config.overlap_chunks)
        scores_TK = routing.topk_scores_TK
        travelling = x_TD, scores_TK.to(torch.promote_types(scores_TK.dtype, torch.float32))
        if self.tuner is not None:
            travelling = self.tuner.watch(routing.topk_ids_TK, routing.kept_TK, shape, *travelling)
        arriving = dispatcher.dispatch(*travelling, routes)
        shared_TD = None if self.shared_mlp is None else self.shared_mlp(x_TD)  # while tokens travel
        leaving = [dispatcher.combine(self.experts(part.x_AD, part.weights_AK, part.plan), part) for part in arriving]
        y_TD = leaving[0].wait() if len(leaving) == 1 else torch.cat([part.wait() for part in leaving])
        if self.training:
            self._warn_if_unbalanced(chosen)
        y_TD = tie(y_TD)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if self.residual is not None:
            y_TD = self.residual(x_TD, y_TD)
        return y_TD.to(x.dtype).view_as(x)

    def _with_gradient_if_others_have(self, x_TD: Tensor) -> Tensor:
        """``x``, requiring a gradient wherever another rank's does: gradients travel on all ranks or on none.

        It makes a difference only where the router learns nothing, since otherwise its weights have theirs everywhere.
        Collective over the EP group where nothing of the layer learns: in a frozen model, some ranks' tokens may depend
        on what is trained, as those of an image, and others not.
        """
        group = self.groups.ep_group
        if group is None or not torch.is_grad_enabled() or _learns(self.router):
            return x_TD
        is_needed = _learns(self.experts) or on_any_rank(x_TD.requires_grad, group, x_TD.device)
        return x_TD.detach().requires_grad_() if is_needed and not x_TD.requires_grad else x_TD

    def reconfigure(self, **changes: Any) -> None:
        """Changes settings of the running layer: ``top_k``, ``capacity_factor`` and ``eval_capacity_factor``.

        Raises:
            ValueError: another setting, which the weights depend on, or a value that the config refuses.
        """
        if fixed := sorted(changes.keys() - {"top_k", "capacity_factor", "eval_capacity_factor"}):
            raise ValueError(
                f"{fixed[0]}: cannot change while the layer exists. Use top_k, capacity_factor and "
                "eval_capacity_factor, or build the layer anew."
            )
        self.config = self.router.config = replace(self.config, **changes)
        self._agreed_shapes.clear()
        if "top_k" in changes:
            self._warn_of_settings(causal=False)

    def _warn_if_unbalanced(self, chosen: Routing) -> None:
        in_charge = self.tap.loss_weights is not None or self.tap.balanced or self.router.balances_itself
        if not in_charge and chosen.topk_scores_TK.requires_grad:
            _warn_without_losses()

    def extra_repr(self) -> str:
        """Shows the choices that matter."""
        return f"router={self.config.router}, top_k={self.config.top_k}, dispatcher={type(self.dispatcher).__name__}"


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@cache
@rank_zero_only
def _warn_without_losses() -> None:
    """Once in a process: Python's own "once" begins again wherever warnings are caught, as ZeRO 3 does each step."""
    warnings.warn(
        "MoE layers are trained with no AuxLossCallback, so that most tokens may end up at a few experts. "
        "Add lightning_moe.AuxLossCallback(load_balancing=0.01) to the Trainer's callbacks; "
        "AuxLossCallback(load_balancing=0) trains without the loss on purpose.",
        stacklevel=2,
    )


@cache
@rank_zero_only
def _warn_of_looking_ahead(router: str) -> None:
    warnings.warn(
        f"router={router!r}: the experts choose among all tokens of a batch, later ones included, so that a causal "
        "model sees its future: its loss is too good, and generation will not be as good as it. Use router='topk' "
        "for a model that is to generate.",
        stacklevel=2,
    )
