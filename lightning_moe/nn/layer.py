"""The Mixture-of-Experts layer.

Shapes: T local tokens, D model width, K experts per token, R rows for this rank's experts.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_moe.config import MoEConfig
from lightning_moe.dispatch import make_dispatcher
from lightning_moe.nn.capacity import expert_capacity, keep_within_capacity
from lightning_moe.nn.experts import GroupedExperts, SharedMLP
from lightning_moe.nn.router import Routing, make_router
from lightning_moe.nn.tap import RoutingTap
from lightning_moe.parallel import ExpertGroups, groups_in_scope


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

    Raises:
        ValueError: ``hidden_size`` is below 1, a name is unknown, or ``num_experts`` is not divisible by the
            expert_parallel_size.
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size}: must be at least 1. Use the width of the model.")
        self.hidden_size = hidden_size
        self.config = config
        self.groups = groups_in_scope()
        self.tap = RoutingTap()
        intermediate_size = config.intermediate_size or 4 * hidden_size
        self.dispatcher = make_dispatcher(config.dispatcher, config.num_experts, self.groups)
        self.router = make_router(hidden_size, config)
        self.experts = GroupedExperts(
            hidden_size, intermediate_size, config.num_experts, config.activation, self.groups
        )
        self.shared_mlp = (
            SharedMLP(hidden_size, config.num_shared_experts * intermediate_size, config.activation)
            if config.num_shared_experts
            else None
        )
        if config.top_k == 1 and config.normalize_topk and config.num_experts > 1:
            warnings.warn(
                "top_k=1 with normalize_topk=True gives every expert the weight 1, so that the router learns from "
                "auxiliary losses only. Set normalize_topk=False (Switch) to let it learn from the task.",
                stacklevel=2,
            )

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
        self.dispatcher = make_dispatcher(self.config.dispatcher, self.num_experts, groups)
        self.groups = groups

    # Dynamo can trace neither uneven collectives nor the tap, so that this is one graph break a layer.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer, [..., D] -> [..., D], in the dtype of ``x``. Collective over the EP group."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x has shape {list(x.shape)}: its last dimension must be hidden_size={self.hidden_size}. Build the "
                "layer for the width of the model."
            )
        x_TD = x.reshape(-1, self.hidden_size)
        routing = self.route(x_TD)
        state = self.dispatcher.dispatch(x_TD, routing.topk_ids_TK, routing.topk_scores_TK, routing.kept_TK)
        y_RD = self.experts(state.x_RD, state.tokens_per_expert_L)
        y_TD = self.dispatcher.combine(y_RD, state)
        if self.shared_mlp is not None:
            y_TD = y_TD + self.shared_mlp(x_TD)
        return y_TD.to(x.dtype).view_as(x)

    def route(self, x_TD: Tensor) -> Routing:
        """Chooses experts and decides what is dropped. Collective over the EP group where there is a capacity."""
        routing: Routing = self.router(x_TD)
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is not None:
            # One capacity for the whole EP group: a rank with a short batch must not disagree about shapes.
            num_tokens = self.dispatcher.largest_num_tokens(x_TD.shape[0], x_TD.device)
            capacity = expert_capacity(
                num_tokens, self.num_experts, self.config.top_k, factor, self.config.min_capacity
            )
            kept_TK = keep_within_capacity(routing.topk_ids_TK, routing.topk_scores_TK, self.num_experts, capacity)
            routing = routing._replace(kept_TK=kept_TK)
        if self.training:
            if self.tap.loss_weights is None and routing.topk_scores_TK.requires_grad:
                _warn_without_losses()
            routing = self.tap(routing)
        return routing

    def extra_repr(self) -> str:
        """Shows the choices that matter."""
        return f"top_k={self.config.top_k}, dispatcher={type(self.dispatcher).__name__}"


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
