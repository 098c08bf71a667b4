"""Figures of what every expert gets.

Shapes: T tokens, K experts per token, E experts, C classes of tokens, V ids that are in a class.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_moe.callbacks._figures import FigureWriter, log_folder, unused_folder
from lightning_moe.callbacks._layers import RoutingCallback, names_of, sum_over_ranks
from lightning_moe.dispatch.permute import count_ids
from lightning_moe.metrics.figures import OTHER_CLASS, class_figure, load_figure, require_matplotlib
from lightning_moe.nn import Decision, MoE

_FOLDER = "experts"
_MAX_IDS = 10_000_000  # a table has an entry for each, up to the largest that is in a class


class ExpertHeatmap(RoutingCallback):
    """Draws the load of every expert of every layer, and which classes of tokens it gets.

    Every ``every_n_steps``, and once more at the end, of the tokens of all ranks since the figure before, each once and
    only in training. Figures are PNG files in a folder ``experts``, and images ``moe/expert_load`` and
    ``moe/token_classes`` of TensorBoard, W&B and MLflow where the Trainer has their loggers. The numbers are in
    ``load.jsonl`` and ``classes.jsonl`` beside them, one line a figure. A figure takes one reduction over ranks and the
    time that rank zero draws it, which grows with layers and experts (docs/monitoring.md); in the steps between nobody
    waits for the device.

    The folder is in that of the first logger that has one for each run, such as TensorBoard's ``version_0``; else where
    ModelCheckpoint would put ``checkpoints``. What is there of another run stays as it is: the folder is then
    ``experts-v1``, and so on. A run that is resumed in the same place appends. A Trainer takes one ExpertHeatmap.

    Args:
        every_n_steps: Optimizer steps from one figure to the next.
        token_classes: Draw the experts' share of each class of tokens, too: ``bytes`` takes the ids of tokens for bytes
            of text, and sets digits, lower case and so on apart; a dict has the ids of each class by its name, and
            what it leaves out is "other". The layers have to be told the ids: ``moe(x, token_ids=ids)``.

    Raises:
        ValueError: ``every_n_steps`` is below 1, classes are empty or overlap, or a layer is not told the ids.
        ModuleNotFoundError: at fit start, where matplotlib is not installed.
        MisconfigurationException: at fit start, where the model has no MoE layer or the log folder is not a local one.
    """

    def __init__(
        self, every_n_steps: int = 50, token_classes: Literal["bytes"] | dict[str, list[int]] | None = None
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1. Use 50.")
        super().__init__()
        self.every_n_steps = every_n_steps
        self.token_classes = token_classes
        self._class_names: list[str] = []
        self._class_of_id: Tensor | None = None
        if token_classes is not None:
            self._class_names, self._class_of_id = classes_by_id(token_classes)
        self._counters: list[tuple[MoE, _Counter]] = []
        self._sums = torch.zeros(0, dtype=torch.int64)
        self._names: list[str] = []
        self._last_figure = 0
        self._folder = ""  # of this run's files; the same on every rank, so that a checkpoint of any has it
        self._writer: FigureWriter | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if find_spec("matplotlib") is None:
            require_matplotlib()
        super().on_fit_start(trainer, pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            require_matplotlib()  # imported here, and not while ranks wait for the first figure

    @override
    def attach(self, pl_module: L.LightningModule) -> None:
        self._names = names_of(self.layers, pl_module)
        sizes = [layer.num_experts * max(len(self._class_names), 1) for layer in self.layers]
        self._sums = torch.zeros(sum(sizes), dtype=torch.int64, device=pl_module.device)
        table_V = None if self._class_of_id is None else self._class_of_id.to(pl_module.device)
        self._counters = []
        for layer, name, sums in zip(self.layers, self._names, self._sums.split(sizes), strict=True):
            counter = _Counter(sums.view(-1, layer.num_experts), table_V, name)
            layer.tap.watchers.append(counter)
            self._counters.append((layer, counter))

    @override
    def detach(self) -> None:
        for layer, counter in self._counters:
            layer.tap.watchers.remove(counter)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_figure = trainer.global_step
        root = log_folder(trainer)
        if "://" in root:
            raise MisconfigurationException(
                f"ExpertHeatmap: the log folder {root} is not a local one, and its files are appended to. Give the "
                "Trainer a first logger with a local folder, or leave the callback out."
            )
        self._writer = None
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            return
        in_root = self._folder == os.path.join(root, os.path.basename(self._folder))
        folder = self._folder if in_root and trainer.global_step > 0 else unused_folder(root, _FOLDER)
        self._folder = trainer.strategy.broadcast(folder)  # rank zero's: others may see the folder late
        if trainer.is_global_zero:
            self._writer = FigureWriter(Path(self._folder), trainer.loggers)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Where the files are."""
        return {"folder": self._folder}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._folder = state_dict["folder"]

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step // self.every_n_steps > self._last_figure // self.every_n_steps:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._last_figure:
            self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        sums, step, first = sum_over_ranks(self._sums), trainer.global_step, self._last_figure + 1
        self._sums.zero_()
        self._last_figure = step
        if self._writer is None:
            return
        sizes = [counter.sums_CE.numel() for _, counter in self._counters]
        counts = [
            part.view(-1, layer.num_experts)
            for part, (layer, _) in zip(sums.cpu().split(sizes), self._counters, strict=True)
        ]
        loads = [counts_CE.sum(0) for counts_CE in counts]
        span = f"steps {first} to {step}" if first < step else f"step {step}"
        at = {"first_step": first, "step": step, "layers": self._names}
        self._writer.append("load.jsonl", {**at, "tokens_per_expert": [load_E.tolist() for load_E in loads]})
        make: Any = partial(load_figure, loads, self._names, f"Load of the experts, {span}")
        self._writer.draw(make, f"load_step={step:06}.png", "moe/expert_load", step)
        if not self._class_names:
            return
        assignments = [counts_CE.tolist() for counts_CE in counts]
        self._writer.append("classes.jsonl", {**at, "classes": self._class_names, "assignments": assignments})
        title = f"Which tokens the experts get, {span}"
        make = partial(class_figure, counts, self._class_names, self._names, title)
        self._writer.draw(make, f"classes_step={step:06}.png", "moe/token_classes", step)


class _Counter:
    """Sums one layer's assignments by class of token and expert; all are of one class where there are none.

    Args:
        sums_CE: To add to, int64.
        class_of_id_V: Class of every id; the last is for ids that are not below V - 1.
        name: Of the layer.
    """

    def __init__(self, sums_CE: Tensor, class_of_id_V: Tensor | None, name: str) -> None:
        self.sums_CE = sums_CE
        self._class_of_id_V = class_of_id_V
        self._name = name

    def look(self, decision: Decision) -> Tensor:
        if self._class_of_id_V is None:
            return decision.tokens_per_expert_E
        ids_T = decision.tokens.token_ids_T
        if ids_T is None:
            raise ValueError(
                f"token_classes: layer {self._name} is not told the ids of its tokens. Call it as "
                "moe(x, token_ids=ids), or use ExpertHeatmap without token_classes."
            )
        num_ids = len(self._class_of_id_V) - 1
        classes_T = self._class_of_id_V[torch.where((ids_T >= 0) & (ids_T < num_ids), ids_T, num_ids).long()]
        num_classes, num_experts = self.sums_CE.shape
        place_TK = classes_T.unsqueeze(1) * num_experts + decision.chosen.topk_ids_TK
        if decision.chosen.assigned_TK is not None:
            place_TK = torch.where(decision.chosen.assigned_TK, place_TK, num_classes * num_experts)
        counts = count_ids(place_TK.flatten(), num_classes * num_experts + 1)[:-1]
        return counts.view(num_classes, num_experts)

    def count(self, looked: Tensor) -> None:
        self.sums_CE += looked


def classes_by_id(token_classes: Literal["bytes"] | dict[str, list[int]]) -> tuple[list[str], Tensor]:
    """Names of classes, "other" last, and the class of every id up to the largest that is named, and of all others.

    Raises:
        ValueError: there is no class, one has no name of its own or no ids, or ids are negative or in two classes.
    """
    classes = _classes_of_bytes() if token_classes == "bytes" else token_classes  # noqa: S105  # no password
    if not classes or not isinstance(classes, dict):
        raise ValueError(
            f"token_classes={token_classes!r}: must be 'bytes', or have at least one class. Use "
            "{'digits': [48, 49, 50]}, for example."
        )
    class_of: dict[int, int] = {}
    names = list(classes)
    for index, (name, ids) in enumerate(classes.items()):
        if name == OTHER_CLASS or not isinstance(ids, Sequence) or not ids:
            problem = "is the name of all ids that are in no class" if name == OTHER_CLASS else "has no list of ids"
            raise ValueError(f"token_classes: {name!r} {problem}. Leave it out.")
        for token_id in ids:
            whole = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not (whole and 0 <= token_id < _MAX_IDS):
                raise ValueError(
                    f"token_classes: {name!r} has {token_id!r}: must be whole numbers from 0 to below {_MAX_IDS:,}."
                )
            if class_of.setdefault(token_id, index) != index:
                raise ValueError(
                    f"token_classes: {token_id} is in {names[class_of[token_id]]!r} and in {name!r}. Leave it in one."
                )
    table_V = torch.full((max(class_of) + 2,), len(names))
    table_V[list(class_of)] = torch.tensor(list(class_of.values()))
    return [*names, OTHER_CLASS], table_V


def _classes_of_bytes() -> dict[str, list[int]]:
    classes: dict[str, list[int]] = {
        name: [] for name in ("space", "control", "digit", "lower", "upper", "punctuation", "non-ASCII")
    }
    for byte in range(256):
        text = chr(byte)
        if byte >= 128:
            name = "non-ASCII"
        elif byte == 32:
            name = "space"
        elif byte < 32 or byte == 127:
            name = "control"  # the ends of lines, mostly
        elif text.isdigit():
            name = "digit"
        elif text.isalpha():
            name = "lower" if text.islower() else "upper"
        else:
            name = "punctuation"
        classes[name].append(byte)
    return classes
