"""``lightning-moe report``: one HTML page of a run, finished or running."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_moe.commands.description import size_text
from lightning_moe.commands.report.find import ReportError, read_run
from lightning_moe.commands.report.page import page
from lightning_moe.commands.report.parts import Part

FILE_NAME = "report.html"


def main(args: Sequence[str]) -> int:
    """Runs the command.

    Args:
        args: What follows ``lightning-moe report``.

    Returns:
        The exit code: 0, or 1 after a message on stderr.

    Raises:
        SystemExit: with 2 after wrong arguments, with 0 after ``--help``.
    """
    given = report_parser().parse_args(list(args))
    folder = Path(given.run_folder)
    output = folder / FILE_NAME if given.output is None else Path(given.output)
    try:
        _require_matplotlib()
        run = read_run(folder)
        sys.stderr.write("".join(f"{note}\n" for note in run.notes))
        _check_output(output)
        size = _write(output, page(run, time.time(), _tracked))
    except (ReportError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"report: {output} ({size_text(size)})\n")
    return 0


def report_parser() -> ArgumentParser:
    """Of what follows ``lightning-moe report``."""
    parser = ArgumentParser(
        prog="lightning-moe report",
        description="Make one HTML page of a finished or running run: loss, balance, drops, heatmaps of the experts, "
        "communication and the config. It has everything in it, and needs no network to be looked at. Reads what "
        "CSVLogger, TensorBoardLogger and ExpertHeatmap have written.",
    )
    parser.add_argument(
        "run_folder",
        type=str,
        help="Folder of the run, or one with several, of which the newest is taken: runs/quickstart, or "
        "runs/quickstart/tensorboard/version_0.",
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"File for the page. The default is RUN_FOLDER/{FILE_NAME}."
    )
    return parser


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError(
            'matplotlib, which draws the figures, is not installed. Run: pip install "lightning_moe[plots]"'
        )


def _check_output(output: Path) -> None:
    """Before everything is drawn."""
    if output.is_dir():
        raise ReportError(f"--output={output}: is a folder. Give a file, such as {output / FILE_NAME}.")
    if not output.parent.is_dir():
        raise ReportError(f"--output={output}: there is no folder {output.parent}. Make it, or give another file.")
    if not os.access(output.parent, os.W_OK):
        raise ReportError(f"--output={output}: {output.parent} is not writable. Give another file with --output.")


def _write(output: Path, text: str) -> int:
    """Writes a file that is whole whenever it is looked at.

    Returns:
        Its size in bytes.

    Raises:
        ReportError: it cannot be written; what was there before still is.
    """
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    content = text.encode("utf-8", errors="replace")
    try:
        part.write_bytes(content)
        part.replace(output)
    except OSError as error:
        raise ReportError(
            f"--output={output}: cannot be written: {error.strerror}. Give another file with --output."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return len(content)


def _tracked(parts: Sequence[Part]) -> Iterator[Part]:
    """With a bar on stderr, if that is a terminal."""
    figures = sum(not isinstance(part, str) for part in parts)
    with tqdm(total=figures, desc="drawing", unit="figure", file=sys.stderr, leave=False, disable=None, delay=1) as bar:
        for part in parts:
            yield part
            if not isinstance(part, str):
                bar.update()
