"""To and from the one file that Lightning keeps of a run without the strategy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.loading import MODEL, Checkpoint, moment_name, names_in_both
from lightning_moe.checkpoint.manifest import is_checkpoint
from lightning_moe.checkpoint.objects import read_objects
from lightning_moe.checkpoint.pieces import Pieces
from lightning_moe.checkpoint.progress import before_epoch_end


class MoECheckpointIO(TorchCheckpointIO):
    """Lets a Trainer without :class:`~lightning_moe.ExpertParallelStrategy` resume from its checkpoints.

    ``Trainer(plugins=[MoECheckpointIO()])`` takes the folders that the strategy saves, in whatever layout, wherever
    it takes a ``ckpt_path``: weights, optimizer states, schedules, loops and callbacks. It saves what the Trainer
    would save without it: one file, from which the strategy resumes in turn.
    """

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a folder of the strategy, or a file of Lightning.

        Raises:
            CheckpointError: the folder is damaged.
        """
        if not is_checkpoint(Path(path)):
            loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
            return loaded
        return as_lightning(Checkpoint(path))


def as_lightning(saved: Checkpoint) -> dict[str, Any]:
    """A checkpoint as Lightning keeps it in one file, with whole tensors."""
    saved.verify()
    run = saved.run()
    whole = dict(run["lightning"])
    if "loops" in whole:
        whole["loops"] = {**whole["loops"], "fit_loop": before_epoch_end(whole["loops"]["fit_loop"], max_epochs=None)}
    whole["state_dict"] = saved.state_dict()
    if "optimizer_groups" not in run:
        return whole
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group in run["optimizer_groups"]:
        first = len(state)
        for name in group["names"]:
            moments = {key: saved.tensor(moment_name(key, name)) for key in saved.moments_of(name)}
            # A copy each: parameters that were optimized together share their count of steps, which torch counts up
            # in place, once for each of them.
            state[len(state)] = deepcopy(run["scalars"].get(name, {})) | moments
        groups.append({**group["values"], "params": list(range(first, len(state)))})
    # A parameter that was never trained has no entry in torch's state.
    whole["optimizer_states"] = [{"state": {i: s for i, s in state.items() if s}, "param_groups": groups}]
    return whole


class LightningFile:
    """A file of Lightning's, read as if it were a folder: the counterpart of :class:`Checkpoint`.

    Args:
        path: Of the file.
        made: Names of the parameters of each of the optimizer's groups, as the user makes them; the file has numbers.
        tied: Further names of tensors that the model has under several.

    Raises:
        CheckpointError: it cannot be read without executing code from it.
    """

    def __init__(self, path: Path, made: list[list[str]], tied: Collection[str]) -> None:
        self.path = path
        self._content: dict[str, Any] = read_objects(path, mapped=True)
        self._made = made
        state_dict = self._content.get("state_dict", {})
        self._weights = {n: value for n, value in state_dict.items() if isinstance(value, Tensor) and n not in tied}
        self._extra = {name: value for name, value in state_dict.items() if not isinstance(value, Tensor)}
        self._state = self._optimizer_state()

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps of each parameter, by the parameter's name."""
        states = self._content.get("optimizer_states") or []
        if len(states) != 1 or not self._made:
            return {}
        found = {}
        saved = [group["params"] for group in states[0]["param_groups"]]
        if [len(group) for group in saved] != [len(names) for names in self._made]:
            raise CheckpointError(
                f"{self.path}: its optimizer has groups of {[len(group) for group in saved]} parameters, and "
                f"configure_optimizers returned one with {[len(names) for names in self._made]}. Return the same "
                "groups as in the run that saved it, or load its weights alone."
            )
        for numbers, names in zip(saved, self._made, strict=True):
            for number, name in zip(numbers, names, strict=True):
                found[name] = states[0]["state"].get(number, {})
        return found

    def verify(self, group: dist.ProcessGroup | None = None) -> None:
        """Nothing: the file has a checksum of its own, which reading compares."""

    def check(self, shapes: Mapping[str, tuple[int, ...]], strict: bool = True) -> list[str]:
        """See :meth:`Checkpoint.check`."""
        stored = {name: tuple(value.shape) for name, value in self._weights.items() if value.numel()}
        return names_in_both(self.path, stored, shapes, strict)

    def fill(self, pieces: Pieces, group: dist.ProcessGroup | None = None) -> None:
        """See :meth:`Checkpoint.fill`; no rank waits for another."""
        for key, piece in pieces.items():
            source_N = self._tensor(key).reshape(-1)[piece.start : piece.start + piece.values_N.numel()]
            piece.values_N.copy_(source_N)

    def _tensor(self, key: str) -> Tensor:
        if key.startswith(MODEL):
            weights: Tensor = self._weights[key.removeprefix(MODEL)]
            return weights
        _, moment, name = key.split("/", 2)
        value: Tensor = self._state[name][moment]
        return value

    def moments_of(self, name: str) -> list[str]:
        """See :meth:`Checkpoint.moments_of`."""
        shape = self._weights[name].shape
        state = self._state.get(name, {})
        return [k for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape and k != "step"]

    def run(self) -> dict[str, Any]:
        """See :meth:`Checkpoint.run`."""
        kept = {k: v for k, v in self._content.items() if k not in ("state_dict", "optimizer_states")}
        run: dict[str, Any] = {"lightning": kept, "extra_state": self._extra}
        if self._state:
            groups = self._content["optimizer_states"][0]["param_groups"]
            values = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
            run["optimizer_groups"] = [
                {"names": names, "values": value} for names, value in zip(self._made, values, strict=True)
            ]
            run["scalars"] = {
                name: {k: v for k, v in state.items() if k not in self.moments_of(name)}
                for name, state in self._state.items()
            }
        return run

    def ranks(self) -> list[dict[str, Any]]:
        """Lightning's files have no random states."""
        return [{}]
