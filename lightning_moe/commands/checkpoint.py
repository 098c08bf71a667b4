"""``lightning-moe checkpoint``: looks into checkpoints, verifies and exports them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_moe.checkpoint import Checkpoint, CheckpointError, export
from lightning_moe.checkpoint.exporting import SHARD_BYTES
from lightning_moe.checkpoint.manifest import FILE_NAME, OnProgress, problems
from lightning_moe.commands.description import as_text, count, describe, other_sizes, size_text

_DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def main(args: Sequence[str]) -> int:
    """Runs the command.

    Args:
        args: What follows ``lightning-moe checkpoint``.

    Returns:
        The exit code: 0, or 1 after a message on stderr.

    Raises:
        SystemExit: with 2 after wrong arguments, with 0 after ``--help``.
    """
    given = checkpoint_parser().parse_args(list(args))
    try:
        code = _COMMANDS[given.action](given[given.action])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has had enough. What is still buffered would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return code


def checkpoint_parser() -> ArgumentParser:
    """Of what follows ``lightning-moe checkpoint``."""
    parser = ArgumentParser(
        prog="lightning-moe checkpoint",
        description="Look into a checkpoint that ExpertParallelStrategy saved, verify it, or export its weights.",
    )
    actions = parser.add_subcommands(dest="action", required=True)

    inspect = ArgumentParser(
        description="Show what a checkpoint holds and what wrote it. Reads no tensors, so that it is quick at any size."
    )
    _add_path(inspect)
    inspect.add_argument("--all", action="store_true", help="List every tensor of the optimizer, too.")
    inspect.add_argument("--json", action="store_true", help="Write everything as JSON, for scripts.")
    actions.add_subcommand("inspect", inspect, help="Show what a checkpoint holds and what wrote it.")

    verify = ArgumentParser(
        description="Compare every file of a checkpoint with the size and checksum that it was written with. The exit "
        "code is 0 if the checkpoint is whole, and 1 if it is not."
    )
    _add_path(verify)
    actions.add_subcommand("verify", verify, help="Compare every file with its size and checksum.")

    exporting = ArgumentParser(
        description="Write the weights and buffers into safetensors files of whole tensors, under the module's own "
        "names: model.safetensors, or several files and an index, as transformers names them. The checkpoint is "
        "verified first. Needs memory for about one tensor."
    )
    _add_path(exporting)
    exporting.add_argument("output", type=str, help="Folder for the files; made if it is not there.")
    exporting.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        default="stored",
        help="What tensors of floating-point numbers are converted to. Others stay as they are.",
    )
    exporting.add_argument(
        "--max_shard_bytes",
        type=PositiveInt,
        default=SHARD_BYTES,
        help="How many bytes of tensors one file may have. A tensor with more gets a file of its own.",
    )
    exporting.add_argument("--overwrite", action="store_true", help="Replace an earlier export in that folder.")
    actions.add_subcommand("export", exporting, help="Write the weights into safetensors files.")
    return parser


def _add_path(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=str, help="Folder of the checkpoint.")


def _inspect(given: Any) -> int:
    checkpoint = Checkpoint(given.path)
    description = describe(checkpoint)
    if given.json:
        sys.stdout.write(json.dumps(description, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(description, every_tensor=given.all))
    wrong = [f"{path}: is missing or of another size\n" for path in other_sizes(checkpoint)]
    sys.stderr.write("".join(wrong))
    return 1 if wrong else 0


def _verify(given: Any) -> int:
    checkpoint = Checkpoint(given.path)
    with _progress() as show:
        found = problems(checkpoint.path, checkpoint.manifest.files, show)
    if found:
        sys.stderr.write("".join(f"{problem}\n" for problem in found))
        return 1
    # The manifest, whose own checksum was compared when it was read, is a file of the checkpoint, too.
    sizes = [stored.size for stored in checkpoint.manifest.files.values()]
    sizes.append((checkpoint.path / FILE_NAME).stat().st_size)
    sys.stdout.write(f"whole: {count(len(sizes), 'file')}, {size_text(sum(sizes))}\n")
    return 0


def _export(given: Any) -> int:
    with _progress() as show:
        done = export(
            given.path,
            given.output,
            dtype=_DTYPES[given.dtype],
            max_shard_bytes=given.max_shard_bytes,
            overwrite=given.overwrite,
            on_progress=show,
        )
    width = max(len(str(path)) for path in done.files)
    for path in done.files:
        sys.stdout.write(f"{path!s:{width}}  {size_text(path.stat().st_size):>8}\n")
    sys.stdout.write(f"exported: {count(done.num_tensors, 'tensor')}, {size_text(done.size)}\n")
    if done.left_out:
        sys.stderr.write(f"left out, because safetensors files hold only tensors: {', '.join(done.left_out)}\n")
    return 0


_COMMANDS: dict[str, Callable[[Any], int]] = {"inspect": _inspect, "verify": _verify, "export": _export}


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on stderr, if that is a terminal."""
    with tqdm(file=sys.stderr, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        phase = ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal phase
            if bar.disable:
                return
            if what != phase:
                phase = what
                bar.set_description(what, refresh=False)
                bar.reset(total)
            bar.update(done - bar.n)

        yield show
