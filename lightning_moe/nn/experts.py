"""The experts of one rank as stacked weights.

Shapes: A tokens that came to this rank, K experts per token, R rows in expert order, L local experts, E experts,
D model width, F expert width, G = 2F where the activation is gated and F where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_moe.config import Activation
from lightning_moe.dispatch.permute import Permutation, permute, unpermute
from lightning_moe.nn.activation import activate
from lightning_moe.nn.tiles import run_in_tiles
from lightning_moe.parallel import ExpertGroups, mark_expert_parameter

_ALIGNMENT = 16
"""Bytes to which grouped_mm wants every row stride aligned, on the CPU too."""


class GroupedExperts(nn.Module):
    """Two grouped matrix products with an activation between: ``down(act(up(x)))``.

    For ``swiglu``, ``w1`` holds the gate above the up projection: ``down(silu(gate(x)) * up(x))``
    (Shazeer 2020, section 2). The names ``w1`` and ``w2`` are those under which DeepSpeed looks for experts.

    Args:
        hidden_size: D.
        intermediate_size: F.
        num_experts: E, over all ranks.
        activation: ``swiglu``, ``gelu`` or ``relu``.
        groups: Decides which experts are made here.

    Attributes:
        w1: [L, G, D].
        w2: [L, D, F].
        seed: Drawn once from torch's default generator, whatever the layout. Expert e of the layer is initialised
            from (seed, e), so that its weights depend neither on the rank that owns it nor on the others.

    Raises:
        ValueError: ``num_experts`` is not divisible by the size of the EP group.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        activation: Activation,
        groups: ExpertGroups,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.num_experts = num_experts
        self.expert_ids = groups.local_experts(num_experts)
        self.seed = int(torch.randint(2**62, (), device="cpu"))
        num_local_experts = len(self.expert_ids)
        width = 2 * intermediate_size if activation == "swiglu" else intermediate_size
        self.w1 = nn.Parameter(torch.empty(num_local_experts, width, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_local_experts, hidden_size, intermediate_size))
        self.reset_parameters()
        self.mark(groups)

    def reset_parameters(self) -> None:
        """Draws every expert as ``nn.Linear`` does, uniform in +-1/sqrt(fan_in), from (seed, expert id)."""
        if self.w1.is_meta:
            return
        generator = torch.Generator()  # of the CPU, so that a GPU starts from the same weights
        for local_id, expert_id in enumerate(self.expert_ids):
            generator.manual_seed((self.seed + expert_id) % 2**63)
            for weight in (self.w1, self.w2):
                bound = 1 / math.sqrt(weight.shape[-1])
                # In fp32, so that bf16 starts at the same point; deepspeed.zero.Init overrides dtype=, hence float().
                drawn = torch.empty(weight.shape[1:], device="cpu").float()
                drawn.uniform_(-bound, bound, generator=generator)
                with torch.no_grad():
                    weight[local_id].copy_(drawn)

    def shard_(self, groups: ExpertGroups) -> None:
        """Keeps this rank's experts of a whole set, in place: the parameters stay the same objects.

        Raises:
            ValueError: ``num_experts`` is not divisible by the size of the EP group.
        """
        kept = groups.local_experts(self.num_experts)
        for weight in (self.w1, self.w2):
            weight.data = weight.data[kept.start : kept.stop].clone()  # a view would keep the whole alive
        self.expert_ids = kept

    def mark(self, groups: ExpertGroups) -> None:
        """Marks the parameters as experts of these groups."""
        for weight in (self.w1, self.w2):
            mark_expert_parameter(weight, groups.ep_size)
            if groups.on_expert_parameter is not None:
                groups.on_expert_parameter(weight)

    def forward(self, x_AD: Tensor, weights_AK: Tensor, plan: Permutation) -> Tensor:
        """Weighted sum of every token's experts on this rank, [A, D] -> [A, D], in the dtype of ``x``.

        On a CPU in tiles that stay in its cache, unless experts are so small or have so few rows that a loop over them
        costs more than it saves; elsewhere in two grouped matrix products.

        Args:
            x_AD: Tokens, in any order; none at all keep the graph connected.
            weights_AK: Weights of their experts' outputs.
            plan: Which row of which expert every assignment gets.
        """
        w1: Tensor = self.w1
        w2: Tensor = self.w2
        dtype, device_type = x_AD.dtype, x_AD.device.type
        if torch.is_autocast_enabled(device_type):  # grouped_mm is on no autocast list
            narrow = torch.get_autocast_dtype(device_type)
            x_AD, w1, w2 = x_AD.to(narrow), w1.to(narrow), w2.to(narrow)
        run = run_in_tiles if tiles_are_faster(x_AD, plan, w1, w2) else run_by_rows
        return run(x_AD, weights_AK, plan, w1, w2, self.activation).to(dtype)

    def extra_repr(self) -> str:
        """Shows which experts are here."""
        return (
            f"experts {self.expert_ids.start}-{self.expert_ids.stop - 1} of {self.num_experts}, "
            f"activation={self.activation}"
        )


def tiles_are_faster(x_AD: Tensor, plan: Permutation, w1_LGD: Tensor, w2_LDF: Tensor) -> bool:
    """Which of two ways to take, by device, dtype and the size of an expert's first product (benchmarks/experts.py)."""
    if x_AD.device.type != "cpu":
        return False
    if not (_grouped_mm_takes(x_AD.dtype, w1_LGD) and _grouped_mm_takes(x_AD.dtype, w2_LDF)):
        return True  # the other way is a loop over experts, too
    return len(plan.assignment_R) * w1_LGD[0].numel() >= _TILES_FROM * len(w1_LGD)


_TILES_FROM = 2**25
"""Multiplications in the first product of a mean expert; at that size both ways take about as long."""


def run_by_rows(
    x_AD: Tensor, weights_AK: Tensor, plan: Permutation, w1_LGD: Tensor, w2_LDF: Tensor, activation: Activation
) -> Tensor:
    """As :func:`~lightning_moe.nn.tiles.run_in_tiles`, all experts at once and on any device."""
    linear = linear_by_expert(plan, x_AD.dtype, w1_LGD, w2_LDF)
    h_RG = linear(permute(x_AD, plan), w1_LGD)
    y_RD = linear(activate(h_RG, activation), w2_LDF)
    return unpermute(y_RD, weights_AK, plan)


def linear_by_expert(plan: Permutation, dtype: torch.dtype, *weights_LGD: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What computes ``x @ weight[l].T`` for the rows of every expert l, from ([R, D], [L, G, D]) to [R, G].

    ``torch.nn.functional.grouped_mm`` where it takes all these weights.
    """
    if all(_grouped_mm_takes(dtype, weight_LGD) for weight_LGD in weights_LGD):
        return partial(_linear_grouped, offsets_L=plan.rows_E.cumsum(0).to(torch.int32))
    if plan.rows_per_expert is not None:
        return _linear_padded
    return partial(_linear_by_slices, rows_per_expert=plan.rows_E.tolist())  # waits for an accelerator


def _linear_grouped(x_RD: Tensor, weight_LGD: Tensor, *, offsets_L: Tensor) -> Tensor:
    y_RG: Tensor = functional.grouped_mm(x_RD, weight_LGD.transpose(-2, -1), offs=offsets_L)
    if y_RG.requires_grad:
        y_RG.register_hook(_contiguous)
    return y_RG


def _linear_padded(x_RD: Tensor, weight_LGD: Tensor) -> Tensor:
    """For as many rows of each, which the host need not look up, so that a CUDA graph can hold it."""
    x_LCD = x_RD.view(len(weight_LGD), -1, x_RD.shape[1])
    return torch.bmm(x_LCD, weight_LGD.transpose(-2, -1)).flatten(0, 1)


def _linear_by_slices(x_RD: Tensor, weight_LGD: Tensor, *, rows_per_expert: list[int]) -> Tensor:
    runs = zip(x_RD.split(rows_per_expert), weight_LGD.unbind(), strict=True)
    return torch.cat([functional.linear(run, weight) for run, weight in runs])


def _contiguous(grad: Tensor) -> Tensor:
    """Gradients that were expanded, as after ``sum()``, are refused by grouped_mm's backward."""
    # Not contiguous(): it takes a tensor with no rows for contiguous whatever its strides.
    return grad.clone(memory_format=torch.contiguous_format) if 0 in grad.stride() else grad.contiguous()


def _grouped_mm_takes(dtype: torch.dtype, weight_LGD: Tensor) -> bool:
    if not hasattr(functional, "grouped_mm"):
        return False
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or dtype != weight_LGD.dtype:
        return False
    if weight_LGD.device.type == "cuda" and dtype != torch.bfloat16:
        return False  # the dtype that grouped_mm takes on every CUDA version; the rest goes by slices
    _, G, D = weight_LGD.shape
    return all(width * weight_LGD.element_size() % _ALIGNMENT == 0 for width in (G, D))
