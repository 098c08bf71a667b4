"""What the metrics must say, by plain loops over tokens in Python's own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_moe import metrics
from lightning_moe.nn import Decision

SCALARS = (
    "LoadImbalance",
    "LoadCV",
    "DeadExperts",
    "RouterEntropy",
    "DroppedFraction",
    "ReroutedFraction",
    "CapacityUtilization",
)
NO_TOKENS = {"LoadImbalance": 1.0, "RouterEntropy": 1.0}


@dataclass
class Batch:
    """One update of one layer."""

    layer: int
    topk_ids_TK: Tensor
    placed_ids_TK: Tensor
    kept_TK: Tensor | None
    assigned_TK: Tensor | None
    probs_TE: Tensor
    valid_T: Tensor | None
    capacity: Tensor | int | None

    def inputs(self) -> dict[str, Any]:
        return dict(vars(self))


def random_batch(layer: int, tokens: int, top_k: int, experts: int, seed: int, full: bool = True) -> Batch:
    """With padding, places without an assignment, moved and dropped assignments; or with none of them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ids_TE = (draw(tokens, experts) ** torch.arange(1, experts + 1)).argsort(1)  # some experts far more than others
    ids_TK, others_TK = ids_TE[:, :top_k], ids_TE.flip(1)[:, :top_k]
    probs_TE = (draw(tokens, experts) * 4).softmax(1)
    if not full:
        return Batch(layer, ids_TK, ids_TK, None, None, probs_TE, None, None)
    assigned_TK, valid_T = draw(tokens, top_k) > 0.2, draw(tokens) > 0.25
    # What stands in places without an assignment must not matter.
    placed_TK = torch.where(draw(tokens, top_k) > 0.7, others_TK, ids_TK)
    kept_TK = draw(tokens, top_k) > 0.3
    return Batch(layer, ids_TK, placed_TK, kept_TK, assigned_TK, probs_TE, valid_T, tokens)


def batch_of(decision: Decision, layer: int) -> Batch:
    """What a layer decided, from the router's own output, and not by the properties of ``decision``."""
    chosen, placed = decision.chosen, decision.placed
    probs = chosen.scores_TE if chosen.probs_TE is None else chosen.probs_TE
    return Batch(
        layer,
        chosen.topk_ids_TK,
        placed.topk_ids_TK,
        placed.kept_TK,
        chosen.assigned_TK,
        probs.detach(),
        decision.tokens.valid_T,
        placed.capacity,
    )


class ByHand:
    """Walks through batches, and sums what the metrics say."""

    def __init__(self, num_experts: list[int]) -> None:
        self.num_experts = num_experts
        layers = range(len(num_experts))
        self.load = [[0] * e for e in num_experts]
        self.together = [[[0] * e for _ in range(e)] for e in num_experts]
        self.tokens, self.assignments, self.dropped, self.moved, self.rows, self.used = (
            [0 for _ in layers] for _ in "123456"
        )
        self.entropy = [0.0 for _ in layers]

    def add(self, batch: Batch) -> None:
        layer, experts = batch.layer, self.num_experts[batch.layer]
        if batch.capacity is not None:
            self.rows[layer] += experts * int(batch.capacity)
        for token, ids in enumerate(batch.topk_ids_TK.tolist()):
            if batch.valid_T is not None and not batch.valid_T[token]:
                continue
            self.tokens[layer] += 1
            for p in batch.probs_TE[token].double().tolist():
                self.entropy[layer] -= p * math.log(p) if p > 0 else 0.0
            chosen = []
            for place, expert in enumerate(ids):
                if batch.assigned_TK is not None and not batch.assigned_TK[token, place]:
                    continue
                chosen.append(expert)
                self.load[layer][expert] += 1
                self.assignments[layer] += 1
                self.moved[layer] += int(batch.placed_ids_TK[token, place]) != expert
                kept = batch.kept_TK is None or bool(batch.kept_TK[token, place])
                self.dropped[layer] += not kept
                self.used[layer] += kept and batch.capacity is not None
            for i in chosen:
                for j in chosen:
                    self.together[layer][i][j] += 1

    def per_layer(self, name: str) -> list[float | None]:
        """``None`` where the layer has nothing to say."""
        return [getattr(self, f"_{name}")(layer) for layer in range(len(self.num_experts))]

    def value(self, name: str, per_layer: bool = False) -> Tensor:
        empty = NO_TOKENS.get(name, 0.0)
        values = self.per_layer(name)
        if per_layer:
            return torch.tensor([empty if v is None else v for v in values], dtype=torch.float64)
        seen = [v for v in values if v is not None]
        return torch.tensor(sum(seen) / len(seen) if seen else empty, dtype=torch.float64)

    def loads(self) -> Tensor:
        most = max(self.num_experts)
        return torch.tensor([load + [0] * (most - len(load)) for load in self.load])

    def affinity(self) -> Tensor:
        most = max(self.num_experts)
        shares = torch.zeros(len(self.num_experts), most, most, dtype=torch.float64)
        for layer, experts in enumerate(self.num_experts):
            for i in range(experts):
                for j in range(experts):
                    if self.together[layer][i][i]:
                        shares[layer, i, j] = self.together[layer][i][j] / self.together[layer][i][i]
        return shares

    def _LoadImbalance(self, layer: int) -> float | None:
        load = self.load[layer]
        return max(load) / (sum(load) / len(load)) if sum(load) else None

    def _LoadCV(self, layer: int) -> float | None:
        load = self.load[layer]
        mean = sum(load) / len(load)
        return math.sqrt(sum((n - mean) ** 2 for n in load) / len(load)) / mean if mean else None

    def _DeadExperts(self, layer: int) -> float | None:
        return float(self.load[layer].count(0)) if sum(self.load[layer]) else None

    def _RouterEntropy(self, layer: int) -> float | None:
        log = math.log(self.num_experts[layer])
        return self.entropy[layer] / self.tokens[layer] / log if self.tokens[layer] else None

    def _DroppedFraction(self, layer: int) -> float | None:
        return self.dropped[layer] / self.assignments[layer] if self.assignments[layer] else None

    def _ReroutedFraction(self, layer: int) -> float | None:
        return self.moved[layer] / self.assignments[layer] if self.assignments[layer] else None

    def _CapacityUtilization(self, layer: int) -> float | None:
        return self.used[layer] / self.rows[layer] if self.rows[layer] else None


def all_metrics(num_experts: list[int], **options: Any) -> dict[str, Any]:
    """One of each that a batch can update."""
    made = {name: getattr(metrics, name)(num_experts, **options) for name in SCALARS}
    made["ExpertLoad"] = metrics.ExpertLoad(num_experts)
    made["ExpertAffinity"] = metrics.ExpertAffinity(num_experts)
    return made


def all_expected(by_hand: ByHand, per_layer: bool = False) -> dict[str, Tensor]:
    """Of :func:`all_metrics`; single values as scalars, which is how torchmetrics returns them."""
    expected = {name: by_hand.value(name, per_layer) for name in SCALARS}
    expected["ExpertLoad"] = by_hand.loads()
    expected["ExpertAffinity"] = by_hand.affinity()
    return {name: value.squeeze() if value.numel() == 1 else value for name, value in expected.items()}
