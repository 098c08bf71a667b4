"""What a user can choose about a Mixture-of-Experts layer: frozen dataclasses that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

Activation = Literal["swiglu", "gelu", "relu"]
ScoreFunction = Literal["softmax", "sigmoid"]
RouterDtype = Literal["float32", "float64"]
Overflow = Literal["drop", "next_expert"]
DropPriority = Literal["score", "position", "random"]
DispatchDtype = Literal["bfloat16"]


@dataclass(frozen=True)
class MoEConfig:
    """Settings of one :class:`~lightning_moe.MoE` layer.

    Args:
        num_experts: Routed experts in the layer, over all ranks.
        top_k: Experts per token. ``expert_choice`` does not read it.
        intermediate_size: Width of one expert; ``None`` is 4 x ``hidden_size``.
        activation: ``swiglu`` (gated), ``gelu`` or ``relu``.
        router: ``topk``, ``switch``, ``gshard``, ``noisy_topk``, ``sinkhorn``, ``expert_choice``,
            ``group_limited``, ``hash``, ``random``, or a name that you registered.
        score_function: Turns logits into scores: ``softmax`` or ``sigmoid``. ``None`` is the router's own: sigmoid
            for ``group_limited``, softmax elsewhere.
        normalize_topk: Divide the selected scores by their sum (Mixtral) or use them as they are.
        capacity_factor: Rows that an expert takes from one rank in training, as a multiple of the even share
            (``lightning_moe.nn.expert_capacity``); ``None`` is dropless. For ``expert_choice`` the mean
            number of experts per token.
        eval_capacity_factor: The same outside training; ``None`` is dropless, and ``capacity_factor`` for
            ``expert_choice``.
        min_capacity: Lower bound of an expert's capacity, in rows.
        overflow: What happens to an assignment over capacity: ``drop``, or ``next_expert``, the token's next-best
            expert that has room.
        drop_priority: Who stays where an expert is full: the highest ``score``, the first by ``position``, or
            ``random``.
        dispatcher: How tokens get to their experts: ``fused``, once to each rank that has any; ``alltoall``, once to
            each expert; ``allgather``, to all ranks; ``local``, where all experts are on every rank; or one of your
            own. ``auto`` is ``local`` for expert_parallel_size 1 and ``fused`` above; ``tune`` times all three on the
            first four batches and takes the fastest.
        num_shared_experts: Experts that every token uses, as one dense MLP of that many times
            ``intermediate_size``; 0 is none.
        score_before_topk: Score all experts and select by score (Mixtral), or select by logit and score the selected
            alone (gpt-oss).
        route_scale: Factor of the routed experts' weights (``routed_scaling_factor`` of DeepSeek).
        expert_bias: Whether the selection, and only it, adds a bias per expert, which
            :class:`~lightning_moe.ExpertBiasUpdate` moves. ``None`` is the router's own: yes for ``group_limited``.
        router_dtype: ``float32`` or ``float64``: of logits, scores and losses.
        jitter: In training the router sees every activation times a random factor in [1 - jitter, 1 + jitter].
            ``None`` is the router's own: 0.01 for ``switch``, 0 elsewhere.
        num_groups: Groups of neighbouring experts in ``group_limited``.
        topk_groups: Groups from which a token may take experts in ``group_limited``.
        sinkhorn_tolerance: ``sinkhorn`` stops where every expert's share is even up to this fraction.
        sinkhorn_iterations: And after this many rounds at the latest.
        pad_to_capacity: Give every expert exactly its capacity in rows, zeros at the end, so that shapes depend on
            the number of tokens alone.
        shared_expert_gate: Weigh the shared experts by a learned sigmoid per token (Qwen2-MoE).
        residual: A dense MLP beside the experts, the two mixed by learned weights per token (PR-MoE).
        overlap_chunks: Parts in which tokens travel between ranks, so that experts compute while the next part is on
            its way. Each part costs the experts a pass of its own: for slow networks and large batches.
        dispatch_dtype: ``bfloat16`` sends activations and their gradients in that precision, which halves the bytes of
            a run in float32 and rounds what travels; ``None`` in their own.

    Raises:
        ValueError: a field is out of its range, or two do not go together; the message names field, value, rule
            and remedy.
    """

    num_experts: int
    top_k: int = 2
    intermediate_size: int | None = None
    activation: Activation = "swiglu"
    router: str = "topk"
    score_function: ScoreFunction | None = None
    normalize_topk: bool = True
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    overflow: Overflow = "drop"
    drop_priority: DropPriority = "score"
    dispatcher: str = "auto"
    num_shared_experts: int = 0
    score_before_topk: bool = True
    route_scale: float = 1.0
    expert_bias: bool | None = None
    router_dtype: RouterDtype = "float32"
    jitter: float | None = None
    num_groups: int = 1
    topk_groups: int = 1
    sinkhorn_tolerance: float = 1e-3
    sinkhorn_iterations: int = 100
    pad_to_capacity: bool = False
    shared_expert_gate: bool = False
    residual: bool = False
    overlap_chunks: int = 1
    dispatch_dtype: DispatchDtype | None = None

    def __post_init__(self) -> None:
        self._check_not_ignored()
        self._check_types()
        self._check_ranges()
        self._check_router()
        self._check_combinations()

    def resolved(self) -> MoEConfig:
        """The same with the router's own values in place of the ``None`` that stands for them."""
        own: dict[str, Any] = {
            name: by_router.get(self.router, by_router[""])
            for name, by_router in _OWN_DEFAULTS.items()
            if getattr(self, name) is None
        }
        return replace(self, **own) if own else self

    def _check_not_ignored(self) -> None:
        if not isinstance(self.router, str):
            raise ValueError(f"router={self.router!r}: must be a name. Known: {', '.join(BUILT_IN_ROUTERS)}.")
        if self.router not in BUILT_IN_ROUTERS:
            return
        for name, routers in _READ_BY.items():
            value, default = getattr(self, name), _DEFAULTS[name]
            own = _OWN_DEFAULTS.get(name, {"": default})
            if value not in (default, own.get(self.router, own[""])) and self.router not in routers:
                raise ValueError(
                    f"{name}={value!r}: router={self.router!r} does not read it. Leave it out, or use router="
                    f"{' or '.join(repr(r) for r in routers)}."
                )

    def _check_types(self) -> None:
        whole = ("num_experts", "top_k", "intermediate_size", "min_capacity", "num_shared_experts")
        for name in (*whole, "num_groups", "topk_groups", "sinkhorn_iterations", "overlap_chunks"):
            value = getattr(self, name)
            if not _is_a(int, value) and not (name == "intermediate_size" and value is None):
                raise ValueError(f"{name}={value!r}: must be a whole number. Write it without a point or quotes.")
        for name in ("capacity_factor", "eval_capacity_factor", "route_scale", "jitter", "sinkhorn_tolerance"):
            value = getattr(self, name)
            if not _is_a((int, float), value) and not (_DEFAULTS[name] is None and value is None):
                raise ValueError(f"{name}={value!r}: must be a number. Write it without quotes.")
        for name, default in _DEFAULTS.items():
            value, is_flag = getattr(self, name), isinstance(default, bool) or name == "expert_bias"
            if is_flag and not isinstance(value, bool) and value is not default:
                raise ValueError(f"{name}={value!r}: must be true or false. Write it without quotes.")
        for name, known in (
            ("activation", Activation),
            ("score_function", ScoreFunction),
            ("overflow", Overflow),
            ("drop_priority", DropPriority),
            ("router_dtype", RouterDtype),
            ("dispatch_dtype", DispatchDtype),
        ):
            if (value := getattr(self, name)) not in get_args(known) and value is not _DEFAULTS[name]:
                raise ValueError(f"{name}={value!r}: unknown. Known: {', '.join(get_args(known))}.")

    def _check_ranges(self) -> None:
        for name, remedy in (
            ("num_experts", "Use 8, for example."),
            ("sinkhorn_iterations", "Use 100."),
            ("overlap_chunks", "Use 1 to send all at once."),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1. {remedy}")
        if not 1 <= self.top_k <= self.num_experts and self.router != "expert_choice":
            raise ValueError(
                f"top_k={self.top_k}: must be from 1 to num_experts={self.num_experts}. Lower top_k or add experts."
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(
                f"intermediate_size={self.intermediate_size}: must be at least 1. Leave it out for 4 x hidden_size."
            )
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not (factor > 0 and math.isfinite(factor)):
                raise ValueError(
                    f"{name}={factor}: must be a finite number above 0. Use 1.25, or null to drop nothing."
                )
        if self.min_capacity < 1:
            raise ValueError(f"min_capacity={self.min_capacity}: must be at least 1 row. Use 4, for example.")
        if self.num_shared_experts < 0:
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts}: must be 0 or more. Use 0 for no shared expert."
            )
        if not (self.route_scale > 0 and math.isfinite(self.route_scale)):
            raise ValueError(f"route_scale={self.route_scale}: must be a finite number above 0. Use 1 for no scaling.")
        if self.jitter is not None and not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter}: must be at least 0 and below 1. Use 0.01, or 0 for none.")
        if not (self.sinkhorn_tolerance > 0 and math.isfinite(self.sinkhorn_tolerance)):
            raise ValueError(
                f"sinkhorn_tolerance={self.sinkhorn_tolerance}: must be a finite number above 0. Use 1e-3, for example."
            )

    def _check_router(self) -> None:
        needed_k = {"switch": 1, "gshard": 2}.get(self.router, self.top_k)
        if self.top_k != needed_k:
            raise ValueError(
                f"top_k={self.top_k}: router={self.router!r} takes {needed_k} expert{'s' * (needed_k > 1)} per token. "
                f"Use top_k={needed_k}, or router='topk'."
            )
        if self.router == "group_limited":
            self._check_groups()
        if self.router == "expert_choice":
            if self.overflow != "drop":
                raise ValueError(
                    f"overflow={self.overflow!r}: with router='expert_choice' experts choose as many tokens as they "
                    "have room for, and nothing overflows. Use overflow='drop', or another router."
                )
            if self.capacity_factor is None:
                raise ValueError(
                    "capacity_factor=None: router='expert_choice' needs it, the mean number of experts per token. "
                    "Use 2, for example."
                )

    def _check_groups(self) -> None:
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups}: must divide num_experts={self.num_experts}. Use a number of groups "
                "that does, or another number of experts."
            )
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(
                f"topk_groups={self.topk_groups}: must be from 1 to num_groups={self.num_groups}. Lower topk_groups "
                "or make more groups."
            )
        within_reach = self.topk_groups * self.num_experts // self.num_groups
        if self.top_k > within_reach:
            raise ValueError(
                f"top_k={self.top_k}: must be at most {within_reach}, the experts in the topk_groups="
                f"{self.topk_groups} groups that a token may use. Lower top_k or raise topk_groups."
            )

    def _check_combinations(self) -> None:
        if self.capacity_factor is None and self.eval_capacity_factor is None:
            if self.overflow != "drop":
                raise ValueError(
                    f"overflow={self.overflow!r}: without a capacity_factor nothing overflows. Set capacity_factor, "
                    "to 1.25 for example, or use overflow='drop'."
                )
            if self.pad_to_capacity:
                raise ValueError(
                    "pad_to_capacity=True: without a capacity_factor there is no capacity to pad to. Set "
                    "capacity_factor, to 1.25 for example, or use pad_to_capacity=False."
                )
        if self.shared_expert_gate and not self.num_shared_experts:
            raise ValueError(
                "shared_expert_gate=True: there is no shared expert to weigh. Set num_shared_experts to 1 or more, or "
                "leave the gate out."
            )
        if self.residual and self.num_shared_experts:
            raise ValueError(
                f"residual=True: its dense MLP takes the place of num_shared_experts={self.num_shared_experts} shared "
                "experts. Use one of the two."
            )


BUILT_IN_ROUTERS = (
    "expert_choice",
    "group_limited",
    "gshard",
    "hash",
    "noisy_topk",
    "random",
    "sinkhorn",
    "switch",
    "topk",
)
"""The routers whose settings are checked here; those that users register check their own."""

_OWN_DEFAULTS: dict[str, dict[str, object]] = {
    "score_function": {"group_limited": "sigmoid", "": "softmax"},
    "expert_bias": {"group_limited": True, "": False},
    "jitter": {"switch": 0.01, "": 0.0},  # Switch Transformer's jitter epsilon
}
"""What ``None`` stands for, by router."""

_LEARNED = tuple(router for router in BUILT_IN_ROUTERS if router not in ("hash", "random"))
_READ_BY = {
    "score_function": ("topk", "group_limited", "sinkhorn"),
    "score_before_topk": ("topk",),
    "route_scale": ("topk", "group_limited", "sinkhorn"),
    "expert_bias": ("topk", "group_limited"),
    "jitter": _LEARNED,
    "num_groups": ("group_limited",),
    "topk_groups": ("group_limited",),
    "sinkhorn_tolerance": ("sinkhorn",),
    "sinkhorn_iterations": ("sinkhorn",),
}
"""Which built-in routers read a setting that not all of them do."""


def _is_a(kind: type | tuple[type, ...], value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_DEFAULTS = {field.name: field.default for field in fields(MoEConfig)}
