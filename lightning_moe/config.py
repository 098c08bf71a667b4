"""What a user can choose about a Mixture-of-Experts layer: frozen dataclasses that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["swiglu", "gelu", "relu"]
ScoreFunction = Literal["softmax"]
Overflow = Literal["drop"]
DropPriority = Literal["score"]


@dataclass(frozen=True)
class MoEConfig:
    """Settings of one :class:`~lightning_moe.MoE` layer.

    Args:
        num_experts: Routed experts in the layer, over all ranks.
        top_k: Experts per token.
        intermediate_size: Width of one expert; ``None`` is 4 x ``hidden_size``.
        activation: ``swiglu`` (gated), ``gelu`` or ``relu``.
        router: Name of a registered router; ``topk`` is softmax, then the ``top_k`` best.
        score_function: Turns logits into scores: ``softmax``.
        normalize_topk: Divide the selected scores by their sum (Mixtral) or use them as they are (Switch).
        capacity_factor: Rows that an expert takes from one rank in training, as a multiple of the even share
            (see :func:`~lightning_moe.nn.expert_capacity`); ``None`` is dropless.
        eval_capacity_factor: The same outside training; ``None`` is dropless.
        min_capacity: Lower bound of an expert's capacity, in rows.
        overflow: What happens to an assignment over capacity: ``drop``.
        drop_priority: Which assignments are dropped first: ``score`` is the lowest score.
        dispatcher: ``auto``, ``local``, ``allgather``, ``alltoall`` or a registered name. ``auto`` is ``local``
            for expert_parallel_size 1, ``allgather`` up to 4, ``alltoall`` above.
        num_shared_experts: Experts that every token uses, as one dense MLP of that many times
            ``intermediate_size``; 0 is none.

    Raises:
        ValueError: a field is out of its range; the message names field, value, rule and remedy.
    """

    num_experts: int
    top_k: int = 2
    intermediate_size: int | None = None
    activation: Activation = "swiglu"
    router: str = "topk"
    score_function: ScoreFunction = "softmax"
    normalize_topk: bool = True
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    overflow: Overflow = "drop"
    drop_priority: DropPriority = "score"
    dispatcher: str = "auto"
    num_shared_experts: int = 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "intermediate_size", "min_capacity", "num_shared_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "intermediate_size" and value is None):
                raise ValueError(f"{name}={value!r}: must be a whole number. Write it without a point or quotes.")
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts}: must be at least 1. Use 8, for example.")
        if not 1 <= self.top_k <= self.num_experts:
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
        for name, known in (
            ("activation", Activation),
            ("score_function", ScoreFunction),
            ("overflow", Overflow),
            ("drop_priority", DropPriority),
        ):
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"{name}={value!r}: unknown. Known: {', '.join(get_args(known))}.")
