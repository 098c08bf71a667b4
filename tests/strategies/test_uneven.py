"""Whatever one rank does differently ends in the right result, and nobody waits for ever (DESIGN 7, bugs 5, 6, 12)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_moe import AuxLossCallback, ExpertParallelStrategy
from lightning_moe.testing.reference import reference_of
from tests.selection import one_in
from tests.strategies.test_exactness import Case
from tests.toy import CONFIG, WIDTH, Toy

SECONDS = 10
BATCHES = {"equal": (4, 4, 4, 4), "shorter": (4, 4, 1, 4), "no tokens": (4, 0, 4, 4)}


class Uneven(Toy):
    """Sums instead of means, so that batches of different sizes make one objective; may send all to one rank."""

    def __init__(self, config: Any, skewed: bool) -> None:
        super().__init__(config, optimizer=torch.optim.SGD)
        if skewed:
            for block in self.blocks:
                # Ties go to experts 0 and 1, those of the first EP rank; trained, they would soon be near-ties, which
                # fp32 and float64 may break differently.
                block.router.weight.requires_grad_(False).zero_()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y, reduction="sum")


def rows_of(rank: int, size: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, 3, WIDTH, generator=generator), torch.randn(size, 3, 3, generator=generator)


def batches(kind: str, rank: int) -> list[tuple[Tensor, Tensor]]:
    return [rows_of(rank, BATCHES[kind][rank], 0), rows_of(rank, 4, 1)]


def fit(case: Case, kind: str, skewed: bool) -> tuple[dict[str, Tensor], list[float]]:
    from lightning_moe.testing.state import full_state

    rank = torch.distributed.get_rank()
    model = Uneven(replace(case.config, dispatcher=case.dispatcher), skewed)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=case.world,
        strategy=ExpertParallelStrategy(case.ep_size, stage=case.stage),
        max_epochs=1,
        val_check_interval=1,
        callbacks=[AuxLossCallback(0.0)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )

    def load() -> DataLoader[Any]:
        return DataLoader(batches(kind, rank), batch_size=None)

    trainer.fit(model, load(), load())  # an evaluation after every step, uneven too
    return full_state(trainer), model.grad_norms


def reference(case: Case, kind: str, skewed: bool) -> tuple[dict[str, Tensor], list[float]]:
    twin = reference_of(Uneven(case.config, skewed), 1)
    assert isinstance(twin, Uneven)
    optimizer = twin.configure_optimizers()
    norms = []
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(case.world):
            x, y = batches(kind, rank)[step]
            if len(x):
                (twin.loss((x.double(), y.double())) / case.world).backward()
        norms.append(float(nn.utils.clip_grad_norm_(twin.parameters(), float("inf"))))
        optimizer.step()
    return {name: p.detach() for name, p in twin.named_parameters()}, norms


@pytest.fixture(scope="module", autouse=True)
def _warm(get_pool: Any) -> None:
    get_pool(4).run(fit, Case(4, 2, 1), "equal", False)  # the time limit below is for a running pool


# And the kind of batches that the default run leaves out.
CASES = [
    (Case(4, 2, 2, "allgather"), "equal"),
    (Case(4, 2, 3, "alltoall"), "equal"),
    (Case(4, 2, 0, "fused", moe=replace(CONFIG, overlap_chunks=3)), "equal"),
    (Case(4, 4, 1, "alltoall"), "shorter"),
    (Case(4, 4, 2, "fused"), "shorter"),
]


@pytest.mark.parametrize(
    ("case", "kind", "skewed"),
    [  # by default every case with two of the three kinds, once spread and once not where it can be
        pytest.param(
            case, kind, skewed, marks=[pytest.mark.grid] * ((i + j + skewed) % 2 or kind == left_out),
            id=f"{case}-{kind}-{'all to one rank' if skewed else 'spread'}",
        )
        for i, (case, left_out) in enumerate(CASES)
        for j, kind in enumerate(BATCHES)
        for skewed in (False, True)
    ],
)  # fmt: skip
def test_ends_soon_and_exact(case: Case, kind: str, skewed: bool, get_pool: Any) -> None:
    check(case, kind, skewed, get_pool)


def check(case: Case, kind: str, skewed: bool, get_pool: Any) -> None:
    results = get_pool(4).run(fit, case, kind, skewed, timeout=SECONDS)
    expected, norms = reference(case, kind, skewed)
    for state, grad_norms in results:
        assert grad_norms == pytest.approx(norms, rel=1e-5)
        for name, weight in expected.items():
            assert_close(state[name], weight.float(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("router", "kind"), one_in(2, ["sinkhorn", "expert_choice", "group_limited", "hash"], ["shorter", "no tokens"])
)
def test_every_router_is_exact_for_every_rank(router: str, kind: str, get_pool: Any) -> None:
    """Those that look at all tokens of a rank, and one without a router's gradient."""
    config = replace(CONFIG, router=router, capacity_factor=1.5 if router == "expert_choice" else None)
    check(Case(4, 2, 2, "alltoall" if router == "sinkhorn" else "allgather", moe=config), kind, False, get_pool)


@pytest.mark.parametrize(
    ("settings", "dispatcher", "kind"),
    [
        ({}, "alltoall", "shorter"),
        ({}, "allgather", "no tokens"),
        ({"overflow": "next_expert"}, "alltoall", "no tokens"),
        ({"pad_to_capacity": True}, "alltoall", "no tokens"),
        ({"pad_to_capacity": True}, "allgather", "shorter"),
        ({"router": "gshard", "drop_priority": "random", "overflow": "next_expert"}, "allgather", "no tokens"),
        ({"router": "expert_choice", "pad_to_capacity": True}, "alltoall", "no tokens"),
        ({"router": "expert_choice", "pad_to_capacity": True}, "allgather", "shorter"),
    ],
    ids=str,
)
def test_capacity_is_agreed_on(settings: dict[str, Any], dispatcher: str, kind: str, get_pool: Any) -> None:
    """All ranks end with the same weights; what is dropped follows the largest batch of the EP group."""
    case = Case(4, 4, 1, dispatcher, moe=replace(CONFIG, capacity_factor=1.0, min_capacity=1, **settings))
    states = get_pool(4).run(fit, case, kind, True, timeout=SECONDS)
    for state, _ in states[1:]:
        for name, weight in states[0][0].items():
            assert torch.equal(state[name], weight), name
