"""A loader that goes on in the middle of an epoch."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_moe.data import ResumableDataLoader


class Numbers(Dataset[int]):
    """Counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        self.read.append(index)
        return index


def batches(loader: Any, epochs: int = 1, first: int = 0) -> list[list[int]]:
    found = []
    for epoch in range(first, first + epochs):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        found += [batch.tolist() for batch in loader]
    return found


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


KINDS: dict[str, Any] = {
    "in order": lambda data: {},
    "shuffled": lambda data: {"shuffle": True},
    "shuffled by its own generator": lambda data: {"shuffle": True, "generator": generator()},
    "of one rank": lambda data: {"sampler": DistributedSampler(data, 2, 1, shuffle=True)},
    "by workers": lambda data: {"shuffle": True, "generator": generator(), "num_workers": 1,
                                "persistent_workers": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [1, 3])
def test_the_rest_of_the_epoch_and_the_next_ones_are_the_same(kind: str, seen: int) -> None:
    def make(**options: Any) -> Any:
        data = Numbers()
        return ResumableDataLoader(data, batch_size=4, **KINDS[kind](data), **options)

    torch.manual_seed(1)
    data = Numbers()
    plain = batches(DataLoader(data, batch_size=4, **KINDS[kind](data)), epochs=3)
    torch.manual_seed(1)
    whole = make()
    assert batches(whole, epochs=3) == plain, "not what torch's own gives"
    del whole  # and with each loader its workers

    torch.manual_seed(1)
    interrupted = make()
    iterator = iter(interrupted)
    before = [batch.tolist() for batch in islice(iterator, seen)]
    state, rng = interrupted.state_dict(), torch.get_rng_state()
    del iterator, interrupted
    torch.manual_seed(77)  # a fresh process
    resumed = make()
    resumed.load_state_dict(state)
    rest = iter(resumed)
    first = next(rest)
    torch.set_rng_state(rng)  # which the strategy does with the first batch
    after = [first.tolist(), *(batch.tolist() for batch in rest)]
    epoch = 1 if state["batches"] else 2  # the next one
    after += batches(resumed, 3 - epoch, first=epoch)
    del rest, resumed
    assert before + after == plain


def test_a_state_between_epochs_begins_the_next() -> None:
    loader = ResumableDataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator())
    iterator = iter(loader)
    epoch = [next(iterator) for _ in range(len(loader))]  # Lightning asks for no more than it has
    state = loader.state_dict()
    assert state["batches"] == 0
    expected = batches(loader)
    resumed = ResumableDataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator())
    resumed.load_state_dict(state)
    assert batches(resumed) == expected != [batch.tolist() for batch in epoch]


def test_what_was_seen_is_not_read_again() -> None:
    data = Numbers()
    resumed = ResumableDataLoader(data, batch_size=4)
    resumed.load_state_dict({"batches": 3, "default": torch.get_rng_state(), "sampler": None})
    assert batches(resumed) == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert data.read == list(range(12, 20))


def test_skipping_leaves_the_default_generator_alone() -> None:
    loader = ResumableDataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator())
    iter(loader)
    state = {"batches": 2, "sampler": None, **loader._epoch.drawn_from}
    resumed = ResumableDataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator())
    resumed.load_state_dict(state)
    before = torch.get_rng_state()
    next(iter(resumed))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_iterable_dataset_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(4))

    with pytest.raises(TypeError, match="dataset=Stream: is an IterableDataset, whose position only it knows"):
        ResumableDataLoader(Stream())


@pytest.mark.parametrize("kinds", [("of one rank", "shuffled"), ("shuffled", "of one rank"),
                                   ("shuffled", "shuffled by its own generator")])  # fmt: skip
def test_an_order_that_cannot_be_continued_is_warned_of(kinds: tuple[str, str]) -> None:
    """As when what ranks saved resumes in one process without a strategy."""

    def make(kind: str) -> Any:
        data = Numbers()
        return ResumableDataLoader(data, batch_size=2, **KINDS[kind](data))

    saved = make(kinds[0])
    for _ in islice(iter(saved), 3):
        pass
    resumed = make(kinds[1])
    resumed.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match="The order of this epoch was drawn by another sampler than"):
        rest = batches(resumed)
    assert len(rest) == len(resumed) - 3
    assert len(batches(resumed)) == len(resumed), "the next epoch is a whole one"
