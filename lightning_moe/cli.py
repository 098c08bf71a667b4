"""The command ``lightning-moe``: LightningCLI with expert parallelism as its default."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_moe.callbacks import AuxLossCallback
from lightning_moe.commands import checkpoint as checkpoint_command
from lightning_moe.commands import report as report_command
from lightning_moe.engine.deepspeed import prepare_import


class MoECLI(LightningCLI):
    """Trains, validates, tests and predicts from YAML.

    ``model`` and ``data`` default to this package's byte-level language model and text data; ``class_path`` puts
    any LightningModule and LightningDataModule in their place. ``trainer.strategy`` defaults to
    :class:`~lightning_moe.ExpertParallelStrategy`, and ``aux_loss`` configures an
    :class:`~lightning_moe.AuxLossCallback` that is always there.

    Args:
        args: Command line, for use from Python; ``None`` is ``sys.argv``.
        **kwargs: As for ``LightningCLI``.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        prepare_import()
        strategy = {"class_path": "lightning_moe.ExpertParallelStrategy"}
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults={"strategy": strategy, **kwargs.pop("trainer_defaults", {})},
            save_config_kwargs={"overwrite": True, **kwargs.pop("save_config_kwargs", {})},
            parser_kwargs={"description": _DESCRIPTION},
            args=args,
            **kwargs,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AuxLossCallback, "aux_loss")
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_moe.models.MoELanguageModel"},
                "data": {"class_path": "lightning_moe.data.TextDataModule"},
            }
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        given = sys.argv[1:] if args is None else args
        if isinstance(given, list) and (said := _nulls_as_configs(given)) != given:
            self.config = parser.parse_args(said)
        else:
            super().parse_arguments(parser, args)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            # What a setting's own check says, out of the list of types and values that jsonargparse puts around it.
            found = [said for said in re.findall(r"^  - (.+)$", str(error), re.M) if not said.startswith(_NOISE)]
            self.parser.error("\n".join(found) or str(error))

    def after_fit(self) -> None:
        """Says where everything is."""
        logs = {f"logs ({type(logger).__name__})": logger.log_dir or logger.save_dir for logger in self.trainer.loggers}
        places = {name: place for name, place in logs.items() if place}
        if self.trainer.log_dir:
            places["config"] = str(Path(self.trainer.log_dir) / "config.yaml")
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if checkpoint:
            places["checkpoint"] = checkpoint
        for name, place in places.items():
            rank_zero_info(f"{name}: {place}")


def _nulls_as_configs(args: Sequence[str]) -> list[str]:
    """``--model.moe.capacity_factor=null`` as a config that says so, in its place.

    jsonargparse 4.53 hands a null two levels below a class on as the text "None", which it then refuses.
    """
    said: list[str] = []
    for arg in args:
        in_two = arg == "null" and said and re.fullmatch(_BELOW_A_CLASS, said[-1])
        match = in_two or re.fullmatch(f"{_BELOW_A_CLASS}=null", arg)
        if in_two:
            said.pop()
        config: Any = None
        for key in reversed(match[1].split(".")) if match else ():
            config = {key: config}
        said.append(f"--config={json.dumps(config)}" if match else arg)
    return said


_COMMANDS = {"checkpoint": checkpoint_command.main, "report": report_command.main}

_DESCRIPTION = (
    "Train Mixture-of-Experts models with expert parallelism. Beside the subcommands below, `lightning-moe checkpoint` "
    "looks into checkpoints, verifies and exports them, and `lightning-moe report` makes a page of what a run has "
    "logged: see `lightning-moe checkpoint --help` and `lightning-moe report --help`."
)
_NOISE = ("Expected a ", "Not a valid subclass of ")
_BELOW_A_CLASS = r"--((?:model|data)(?:\.\w+){2,})"


def main(args: ArgsType = None) -> None:
    """Entry point of ``lightning-moe``."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given and (command := _COMMANDS.get(given[0])):
        sys.exit(command(given[1:]))
    # What Lightning 2.6 does on torch 2.13, and at which a user of the command can do nothing.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).* is deprecated")
    MoECLI(args)


if __name__ == "__main__":
    main()
