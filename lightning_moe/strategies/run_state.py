"""A run as a checkpoint keeps it: what there is to save, and putting it back in any layout."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_moe.checkpoint.agreement import agreed
from lightning_moe.checkpoint.errors import CheckpointError
from lightning_moe.checkpoint.loading import MODEL, Checkpoint, moment_name
from lightning_moe.checkpoint.logical import all_names, logical_parameters, tied_names
from lightning_moe.checkpoint.manifest import SavedLayout
from lightning_moe.checkpoint.objects import check_readable, plain, without_unreadable
from lightning_moe.checkpoint.pieces import Piece
from lightning_moe.checkpoint.saving import Snapshot
from lightning_moe.checkpoint.single import LightningFile
from lightning_moe.engine import zero_state
from lightning_moe.engine.param_groups import with_split, without_split
from lightning_moe.engine.zero_state import Master
from lightning_moe.parallel import ExpertGroups

_NOT_HYPER_PARAMETERS = ("params", "param_names", "name", "moe")
_HYPER_PARAMETERS = {"hyper_parameters", "datamodule_hyper_parameters", "hparams_type"}
_LIBRARIES = ("lightning_moe", "torch", "lightning", "deepspeed")


@dataclass(frozen=True)
class OptimizerGroups:
    """The optimizer's groups of parameters, as the user made them and as they are split for experts.

    Args:
        made: Names of the parameters in each group that the user made.
        sources: For each group after the split, the one that it comes from.
    """

    made: list[list[str]]
    sources: list[int]


@dataclass(frozen=True)
class Restored:
    """What is left to put back once tensors are.

    Args:
        lightning: Lightning's checkpoint, without tensors of the model.
        rng: States of this rank's random generators; ``None`` if the checkpoint has none.
    """

    lightning: dict[str, Any]
    rng: dict[str, Any] | None


def rng_states() -> dict[str, Any]:
    """States of torch's, NumPy's and Python's random generators, and of the one of the current GPU."""
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {**_collect_rng_states(include_cuda=False), "cuda": device}


def set_rng_states(states: dict[str, Any]) -> None:
    """Sets what :func:`rng_states` gave, read back from a checkpoint."""
    kind, keys, *rest = states["numpy"]
    _set_rng_states(
        {"torch": states["torch"], "python": states["python"], "numpy": (kind, keys.numpy().astype("uint32"), *rest)}
    )
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class RunState:
    """The state of a run on this rank.

    Args:
        module: The whole LightningModule.
        engine: DeepSpeed's, of training or of evaluation.
        expert_groups: Of the strategy.
        optimizer_groups: ``None`` in evaluation.
        all_ranks: Their group, with a CPU backend.
    """

    def __init__(
        self,
        module: nn.Module,
        engine: Any,
        expert_groups: ExpertGroups,
        optimizer_groups: OptimizerGroups | None,
        all_ranks: dist.ProcessGroup,
    ) -> None:
        self._module = module
        self._engine = engine
        self._expert_groups = expert_groups
        self._optimizer_groups = optimizer_groups
        self._all_ranks = all_ranks
        self._logical = logical_parameters(module, expert_groups)
        self._parameters = {n: p for n, p in module.named_parameters() if n in self._logical}
        if getattr(engine.optimizer, "swap_optimizer", False):
            raise CheckpointError(
                "offload_optimizer.device='nvme': the optimizer's state is in files of DeepSpeed's, which a checkpoint "
                "does not take. Use device='cpu'."
            )
        self._masters = zero_state.masters(engine, self._parameters)
        persistent = module.state_dict().keys()
        self._tied = {name: first for name, first in tied_names(module).items() if name in persistent}
        self._buffers = {name: b for name, b in module.named_buffers() if name in persistent and b.numel()}

    # ---------------------------------------------------------------------------------------- saving

    def snapshot(self, checkpoint: Mapping[str, Any], layout: SavedLayout, with_frozen: bool = True) -> Snapshot:
        """What a checkpoint is to keep.

        Args:
            checkpoint: Lightning's, with its ``optimizer_states`` unless it is of weights alone.
            layout: Of the run.
            with_frozen: ``False`` leaves frozen parameters out.

        Raises:
            CheckpointError: something in ``checkpoint`` or of the optimizer could not be given back.
        """
        groups = self._optimizer_groups if "optimizer_states" in checkpoint else None
        names = [name for name, parameter in self._parameters.items() if with_frozen or parameter.requires_grad]
        run: dict[str, Any] = {
            "lightning": self._of_lightning(checkpoint),
            "extra_state": self._extra_state(),
            "buffers": list(self._buffers),
            "tied": self._tied,
        }
        if groups is not None:
            schedulers = checkpoint["lr_schedulers"]
            run["lightning"]["lr_schedulers"] = [without_split(state, groups.sources) for state in schedulers]
            run["optimizer_groups"] = self._hyper_parameters(groups)
            run["engine"] = zero_state.counters(self._engine)
        rank: dict[str, Any] = {"rng": rng_states()}
        if loaders := checkpoint["loops"]["fit_loop"].get("combined_loader"):
            rank["dataloaders"] = loaders  # where this rank is in its data
        run, rank = plain(run), plain(rank)
        check_readable(run, "checkpoint")
        check_readable(rank, "state of a rank")
        return Snapshot(
            pieces=self._shares(names, with_moments=groups is not None),
            scalars=self._scalars(names) if groups is not None else {},
            run=run,
            rank=rank,
            layout=layout,
            step=checkpoint["global_step"],
            epoch=checkpoint["epoch"],
            versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        )

    def _of_lightning(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Lightning's checkpoint without tensors of the model, and without hyper-parameters that it cannot keep."""
        kept = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        for key in _HYPER_PARAMETERS & kept.keys():
            kept[key], left_out = without_unreadable(kept[key])
            if left_out:
                rank_zero_warn(
                    f"{key}: a checkpoint does not keep {', '.join(left_out)}, which it could not read back without "
                    "executing code. Resuming needs none of it; leave it out with save_hyperparameters(ignore=[...])."
                )
        return kept

    def _shares(self, names: list[str], with_moments: bool) -> dict[str, Piece]:
        """What this rank writes of the parameters, of what the optimizer keeps of their elements, and of buffers."""
        pieces = {}
        for name in names:
            master, logical = self._masters[name], self._logical[name]
            for key, tensor in self._tensors(name, with_moments).items():
                piece = Piece(logical.shape, logical.start + master.start, master.part_of(tensor))
                pieces[key] = piece if master.is_partition else piece.share(logical.replica, logical.replicas)
        if dist.get_rank() == 0:  # they may differ between ranks, as the statistics of a BatchNorm do
            pieces |= {MODEL + name: Piece(tuple(b.shape), 0, b.reshape(-1)) for name, b in self._buffers.items()}
        return pieces

    def _tensors(self, name: str, with_moments: bool) -> dict[str, Tensor]:
        """The tensors that hold a parameter and the optimizer's moments of it, by their names in a checkpoint."""
        master, there = self._masters[name], self._logical[name].name
        moments = zero_state.moments(zero_state.base_optimizer(self._engine), master) if with_moments else {}
        return {MODEL + there: master.owner} | {moment_name(key, there): value for key, value in moments.items()}

    def _scalars(self, names: list[str]) -> dict[str, dict[str, Any]]:
        optimizer, found = zero_state.base_optimizer(self._engine), {}
        for name in names:
            master, logical = self._masters[name], self._logical[name]
            if master.is_optimized and master.start == 0 and master.numel:
                found[logical.name] = plain(zero_state.scalars(optimizer, master))
                self._check_scalars(name, found[logical.name])
        return found

    def _check_scalars(self, name: str, scalars: Mapping[str, Any]) -> None:
        """Refuses state of several elements that are not the parameter's, where a rank has a part of the parameter."""
        master, logical = self._masters[name], self._logical[name]
        if not master.is_partition and self._parameters[name].numel() == math.prod(logical.shape):
            return
        for key, value in scalars.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                kind = type(zero_state.base_optimizer(self._engine)).__name__
                raise CheckpointError(
                    f"{kind} keeps {key!r} of shape {list(value.shape)} for {name}, which is neither one value for "
                    "each of its elements nor one for all, so that it belongs to this layout. Use an optimizer that "
                    "works element by element, such as AdamW, or stage=0 with expert_parallel_size=1."
                )

    def _hyper_parameters(self, groups: OptimizerGroups) -> list[dict[str, Any]]:
        """Those of the optimizer, with names of parameters, by the groups that the user made."""
        split, saved = zero_state.base_optimizer(self._engine).param_groups, []
        for index, names in enumerate(groups.made):
            group = split[groups.sources.index(index)] if index in groups.sources else {}
            values = {key: value for key, value in group.items() if key not in _NOT_HYPER_PARAMETERS}
            saved.append(
                {"names": [self._logical[name].name for name in names if name in self._logical], "values": values}
            )
        return saved

    def _extra_state(self) -> dict[str, Any]:
        """What the module's ``state_dict`` has that is no tensor of elements here, such as metrics' states."""
        known = self._parameters.keys() | self._buffers.keys() | self._tied.keys()
        return {name: value for name, value in self._module.state_dict().items() if name not in known}

    # --------------------------------------------------------------------------------------- loading

    def restore(self, saved: Checkpoint | LightningFile, strict: bool = True, with_frozen: bool = True) -> Restored:
        """Puts a run back, from whatever layout it was saved in. Collective.

        Args:
            saved: The checkpoint.
            strict: Refuses names that only the model or only the checkpoint has.
            with_frozen: ``False`` where frozen parameters were left out when it was saved.

        Raises:
            CheckpointError: on every rank, when it is damaged or of another model.
        """
        left_out = set() if with_frozen else {n for n, p in self._parameters.items() if not p.requires_grad}
        there = {name: logical for name, logical in self._logical.items() if name not in left_out}
        buffers = {name: tuple(b.shape) for name, b in self._buffers.items()}
        saved.verify(self._all_ranks)
        with agreed(self._all_ranks):
            both = set(saved.check(all_names(there, self._expert_groups) | buffers, strict))
            names = [name for name, logical in there.items() if logical.name in both]
            run, rank = saved.run(), self._of_this_rank(saved.ranks())
            groups = self._optimizer_groups if "optimizer_groups" in run else None
            if groups is not None:
                self._make_moments(saved, names, run["scalars"])
        zero_state.before_filling(self._engine)
        self._fill(saved, names, both, with_moments=groups is not None)
        if self._optimizer_groups is not None:
            zero_state.after_filling(self._engine, weights_too=self._fill_weights(saved, names))
        self._module.load_state_dict(run["extra_state"], strict=False)

        kept: dict[str, Any] = run["lightning"]
        if groups is not None:
            self._set_hyper_parameters(run["optimizer_groups"], groups)
            if "engine" in run:
                zero_state.set_counters(self._engine, run["engine"])
            kept["lr_schedulers"] = [with_split(state, groups.sources) for state in kept["lr_schedulers"]]
            if "dataloaders" in rank:
                kept["loops"]["fit_loop"]["combined_loader"] = rank["dataloaders"]
        return Restored(kept, rank.get("rng"))

    def _fill(self, saved: Checkpoint | LightningFile, names: list[str], both: set[str], with_moments: bool) -> None:
        """Reads these parameters, and the buffers that the checkpoint has, into their places."""
        targets = {
            MODEL + n: (b, Piece(tuple(b.shape), 0, b.reshape(-1))) for n, b in self._buffers.items() if n in both
        }
        for name in names:
            master, logical = self._masters[name], self._logical[name]
            for key, tensor in self._tensors(name, with_moments).items():
                piece = Piece(logical.shape, logical.start + master.start, master.part_of(tensor))
                targets[key] = (tensor, piece)
        saved.fill({key: piece for key, (_, piece) in targets.items()}, self._all_ranks)
        for tensor, piece in targets.values():
            if not tensor.is_contiguous():  # as in channels_last: what was filled is a copy
                tensor.detach().copy_(piece.values_N.view(tensor.shape))

    def _fill_weights(self, saved: Checkpoint | LightningFile, names: list[str]) -> bool:
        """Whether it has read the weights, too, of which this rank's masters are a part.

        On the CPU: gloo gathers them from the other ranks at half the speed at which they are read again.
        """
        weights = {name: self._parameters[name].detach() for name in names}
        if not zero_state.keeps_whole_weights(self._engine) or any(w.device.type != "cpu" for w in weights.values()):
            return False
        pieces = {}
        for name, weight in weights.items():
            logical = self._logical[name]
            pieces[MODEL + logical.name] = Piece(logical.shape, logical.start, weight.view(-1))
        saved.fill(pieces, self._all_ranks)
        return True

    def _make_moments(
        self, saved: Checkpoint | LightningFile, names: list[str], scalars: Mapping[str, dict[str, Any]]
    ) -> None:
        """Gives the optimizer, which makes its state in its first step, the state that is to be filled."""
        wanted: list[tuple[Master, list[str], dict[str, Any]]] = []
        for name in names:
            master, logical = self._masters[name], self._logical[name]
            if master.is_optimized and master.numel:
                entries = scalars.get(logical.name, {})
                self._check_scalars(name, entries)
                wanted.append((master, saved.moments_of(logical.name), entries))
        zero_state.make_state(zero_state.base_optimizer(self._engine), wanted)

    def _set_hyper_parameters(self, saved: list[dict[str, Any]], groups: OptimizerGroups) -> None:
        """Sets those of each group to what the group had that its first known parameter was in."""
        by_name = {name: group["values"] for group in saved for name in group["names"]}
        for group, source in zip(zero_state.base_optimizer(self._engine).param_groups, groups.sources, strict=True):
            names = (self._logical[name].name for name in groups.made[source] if name in self._logical)
            # Experts of DeepSpeed's own layer that the first rank does not have are in none of its groups.
            in_its_place = saved[source]["values"] if source < len(saved) else {}
            group.update(next((by_name[name] for name in names if name in by_name), in_its_place))

    def _of_this_rank(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """What this rank had; of more ranks than there were, the further ones go on as the first do."""
        return states[dist.get_rank() % len(states)]
