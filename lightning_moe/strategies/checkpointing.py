"""The part of the strategy that saves and resumes runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_moe.checkpoint import Checkpoint, CheckpointError, is_checkpoint
from lightning_moe.checkpoint.agreement import agreed
from lightning_moe.checkpoint.deepspeed_format import check_layout
from lightning_moe.checkpoint.logical import tied_names
from lightning_moe.checkpoint.manifest import SavedLayout
from lightning_moe.checkpoint.progress import before_epoch_end, is_within_epoch
from lightning_moe.checkpoint.saving import Snapshot
from lightning_moe.checkpoint.single import LightningFile
from lightning_moe.engine import deepspeed as engine
from lightning_moe.parallel import ExpertGroups
from lightning_moe.strategies.agreement import Agreement
from lightning_moe.strategies.preemption import NUM_REQUESTS, Preemption
from lightning_moe.strategies.run_state import OptimizerGroups, RunState, set_rng_states
from lightning_moe.strategies.writer import CheckpointWriter, OnSaveError

if TYPE_CHECKING:
    import lightning as L


class CheckpointingStrategy(DeepSpeedStrategy):
    """Saves runs in the format of :mod:`lightning_moe.checkpoint` and resumes them in any layout.

    Args:
        async_save: Writes checkpoints while training goes on.
        on_save_error: ``"raise"`` or ``"warn"``.
        **deepspeed_kwargs: Those of Lightning's strategy.
    """

    def __init__(
        self, *, async_save: bool = False, on_save_error: OnSaveError = "raise", **deepspeed_kwargs: Any
    ) -> None:
        if on_save_error not in ("raise", "warn"):
            raise ValueError(
                f"on_save_error={on_save_error!r}: must be 'raise' or 'warn'. Use 'raise' to end a run whose "
                "checkpoints cannot be saved."
            )
        super().__init__(**deepspeed_kwargs)
        self.expert_groups: ExpertGroups | None = None
        self.optimizer_groups: OptimizerGroups | None = None
        self._writer = CheckpointWriter(async_save, on_save_error)
        self._resumed_rng: dict[str, Any] | None = None

    @property
    def _stage(self) -> int:
        return int((self.config or {}).get("zero_optimization", {}).get("stage", 0))

    def _check_checkpoint_callbacks(self, trainer: L.Trainer) -> None:
        """Refuses what could leave a run without a checkpoint to resume from."""
        for callback in trainer.checkpoint_callbacks:
            if self._writer.in_background and isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
                raise MisconfigurationException(
                    "save_last='link' with async_save=True: the link would lead to a checkpoint that is still being "
                    "written. Use ModelCheckpoint(save_last=True), or async_save=False."
                )

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(filepath):
            raise ValueError(
                f"filepath={str(filepath)!r}, storage_options={storage_options!r}: all ranks write one folder, which "
                "takes a file system that they share. Save to a path, and copy the checkpoint from there."
            )
        path = Path(self.broadcast(filepath)).absolute()

        def snapshot() -> Snapshot:
            return self._run_state().snapshot(checkpoint, self._layout(), not self.exclude_frozen_parameters)

        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.training and trainer.fit_loop._should_accumulate():
            rank_zero_warn(
                f"{path}: is saved between two optimizer steps, and a checkpoint has no gradients: those of the "
                "micro-batches since the last step are not in it. Save after a step, as ModelCheckpoint does."
            )
        self._writer.write(snapshot, path)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: a checkpoint takes the optimizer's state from where it is, and no rank has the whole of it."""
        return {}

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._writer.wait()
        path = Path(checkpoint_path)
        if not is_checkpoint(path) and (path / "latest").is_file():
            return self._load_deepspeed_checkpoint(path, weights_only)
        assert self.lightning_module is not None
        saved: Checkpoint | LightningFile
        with agreed(self._writer.group):
            if path.is_file():
                made = self.optimizer_groups.made if self.optimizer_groups is not None else []
                saved = LightningFile(path, made, tied_names(self.lightning_module))
            else:
                saved = Checkpoint(path)
        strict, with_frozen = self.lightning_module.strict_loading, not self.exclude_frozen_parameters
        restored = self._run_state().restore(saved, strict, with_frozen)
        trainer = self.lightning_module.trainer
        if trainer.state.fn == TrainerFn.FITTING:
            loops = restored.lightning["loops"]
            if restored.rng is not None:
                set_rng_states(restored.rng)
                self._resumed_rng = restored.rng if is_within_epoch(loops["fit_loop"]) else None
            loops["fit_loop"] = before_epoch_end(loops["fit_loop"], trainer.max_epochs)
        return restored.lightning

    def _load_deepspeed_checkpoint(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        """Loads what Lightning's own DeepSpeedStrategy saved, in the same layout."""
        assert self.lightning_module is not None
        check_layout(path, self._layout())
        if self._stage == 3 and self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            raise CheckpointError(
                f"{path}: is of DeepSpeed's format, of which ZeRO 3 cannot load the weights alone. Resume from it with "
                "trainer.fit(ckpt_path=...), save anew with trainer.save_checkpoint, and evaluate that."
            )
        rank_zero_info(
            f"{path}: is of DeepSpeed's format, which resumes only in the layout that it was saved in. Checkpoints "
            "that are saved from now on resume in any."
        )
        with engine.plain_checkpoints(self.deepspeed_engine) if self._stage == 3 else nullcontext():
            return super().load_checkpoint(path, weights_only)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        self._writer.remove(Path(filepath).absolute())

    def _layout(self) -> SavedLayout:
        assert self.expert_groups is not None
        return SavedLayout(
            self.world_size, self.expert_groups.ep_size, self._stage, str(self.precision_plugin.precision)
        )

    def _run_state(self) -> RunState:
        module = self.lightning_module
        assert module is not None
        assert self.expert_groups is not None
        groups = self.optimizer_groups if module.trainer.state.fn == TrainerFn.FITTING else None
        return RunState(module, self.deepspeed_engine, self.expert_groups, groups, self._writer.group)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._resumed_rng is not None:
            # Fetching the first batch has drawn from the generators once more than the run that was not interrupted.
            set_rng_states(self._resumed_rng)
            self._resumed_rng = None
        super().on_train_batch_start(batch, batch_idx)

    @override
    def setup(self, trainer: L.Trainer) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(c, Preemption) for c in callbacks):
            # Ranks agree before a callback of the user's waits for them, and a run ends when all of those are done.
            agreement = Agreement(NUM_REQUESTS)
            callbacks[:] = [agreement, *callbacks, Preemption(agreement)]
        super().setup(trainer)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(exception, SIGTERMException) and self.lightning_module is not None:
            trainer = self.lightning_module.trainer
            if trainer.state.fn == TrainerFn.FITTING:
                self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        """Saves where ``ckpt_path="last"`` looks, unless a callback has done so since the last step."""
        callbacks = [
            c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is not None
        ]
        if not callbacks:
            rank_zero_info("No checkpoint is saved: the Trainer has no ModelCheckpoint.")
        elif not any(c.save_last and c._last_global_step_saved == trainer.global_step for c in callbacks):
            first = callbacks[0]
            path = Path(str(first.dirpath)) / f"{first.CHECKPOINT_NAME_LAST}{first.FILE_EXTENSION}"
            trainer.save_checkpoint(path)
            rank_zero_info(f'Saved {path}, from which ckpt_path="last" continues.')
        self._writer.wait()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._writer.wait()

    @override
    def teardown(self) -> None:
        self._writer.close()
        super().teardown()
