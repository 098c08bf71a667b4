"""A DataLoader with which a run that resumes goes on in the middle of an epoch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

T_co = TypeVar("T_co", covariant=True)


class ResumableDataLoader(DataLoader[T_co]):
    """A ``DataLoader`` with a ``state_dict``, which Lightning keeps in checkpoints and gives back.

    A run that resumes in the middle of an epoch gets the batches that were left, in the order in which they would
    have come; with torch's own class it gets the first ones again. Batches that were seen are skipped by their
    indices, without reading them. It takes what ``DataLoader`` takes.

    Raises:
        TypeError: the dataset is an ``IterableDataset``, which has no indices.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"dataset={type(dataset).__name__}: is an IterableDataset, whose position only it knows. Use a "
                "map-style dataset, or a loader with a state_dict of its own, such as torchdata's."
            )
        self._epoch = _Epoch()
        self._resumed: dict[str, Any] | None = None
        super().__init__(dataset, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """How many batches of this epoch were given, and what its order was drawn from."""
        if self._epoch.given >= len(self):  # the next epoch draws for itself
            return {"batches": 0, **self._generators(), "sampler": self._sampler_epoch(1)}
        return {"batches": self._epoch.given, **self._epoch.drawn_from, "sampler": self._sampler_epoch(0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass begin where :meth:`state_dict` was called."""
        self._resumed = state

    @override
    def __iter__(self) -> Any:
        epoch, resumed, self._resumed = self._epoch, self._resumed, None
        epoch.skip, epoch.drawn_from = 0, self._generators()
        if resumed is not None:
            epoch.skip = resumed["batches"]
            is_another = (resumed["sampler"] is None) != (self._sampler_epoch(0) is None)
            if is_another or not epoch.drawn_from.keys() <= resumed.keys():
                if epoch.skip:
                    warnings.warn(
                        f"The order of this epoch was drawn by another sampler than {type(self.sampler).__name__}, or "
                        "from another generator, as on one process and on several: of its data, some comes twice and "
                        "some not at all. From the next epoch on all is well.",
                        stacklevel=2,
                    )
            else:
                epoch.drawn_from = {key: resumed[key] for key in epoch.drawn_from}
                if self.generator is not None:
                    self.generator.set_state(epoch.drawn_from["own"])
                if resumed["sampler"] is not None:
                    # Lightning does so itself, but workers have taken their first batches by then.
                    self.sampler.set_epoch(resumed["sampler"])  # type: ignore[attr-defined]
        return epoch.count(super().__iter__())

    def _sampler_epoch(self, further: int) -> int | None:
        """The epoch that a sampler draws an order for that is the same on all ranks, such as DistributedSampler."""
        epoch = getattr(self.sampler, "epoch", None) if hasattr(self.sampler, "set_epoch") else None
        return None if epoch is None else epoch + further

    def _generators(self) -> dict[str, Tensor]:
        """States of the generators that the order of an epoch may be drawn from."""
        own = {} if self.generator is None else {"own": self.generator.get_state()}
        return {"default": torch.get_rng_state(), **own}

    @property
    def _index_sampler(self) -> Any:
        return _Rest(super()._index_sampler, self.generator, self._epoch)  # type: ignore[misc]


@dataclass
class _Epoch:
    """Where a pass through the data is.

    Args:
        skip: Batches to leave out at its beginning.
        given: Batches given, with those left out.
        drawn_from: States of the random generators before its order was drawn.
    """

    skip: int = 0
    given: int = 0
    drawn_from: dict[str, Tensor] = field(default_factory=dict)

    def count(self, batches: Iterator[T_co]) -> Iterator[T_co]:
        self.given = self.skip
        for batch in batches:
            self.given += 1
            yield batch


@dataclass(frozen=True)
class _Rest:
    """What is left of an epoch's indices. An iterator with persistent workers keeps it over epochs."""

    indices: Any
    generator: torch.Generator | None
    epoch: _Epoch

    def __len__(self) -> int:
        """Of a whole epoch."""
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self.indices)
        if self.epoch.skip:
            with contextlib.nullcontext() if self.generator is not None else torch.random.fork_rng(devices=[]):
                if self.generator is None:
                    torch.set_rng_state(self.epoch.drawn_from["default"])
                    # The loader's iterator draws a seed for its workers before the sampler draws the order.
                    torch.empty((), dtype=torch.int64).random_()
                for _ in islice(indices, self.epoch.skip):
                    pass
        yield from indices
