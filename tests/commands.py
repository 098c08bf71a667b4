"""Running the project's commands as their users do: as processes of their own, with a bounded wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

_MARKER = "LIGHTNING_MOE_TEST_COMMAND"
# What the surrounding run (or a pool of it) may have set and a user's shell has not.
_NOT_A_USERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


@dataclass(frozen=True)
class Finished:
    """How a command ended.

    Attributes:
        code: Exit code of the process that was started; minus the signal's number where one ended it.
        output: What it and all processes below it wrote to stdout and stderr.
        left: Command lines of processes of it that were still there ``patience`` seconds after it had ended.
        seconds_after_mark: From the creation of the file ``mark`` to the end of the last process.
    """

    code: int
    output: str
    left: list[str]
    seconds_after_mark: float | None


def run_command(
    command: Sequence[str | Path],
    folder: Path,
    timeout: float,
    patience: float = 2.0,
    mark: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a command in ``folder`` to its end, and finds what it leaves behind.

    A process belongs to it if it carries the marker in its environment, whoever its parent is by then.

    Raises:
        AssertionError: It did not end within ``timeout`` seconds; everything of it is killed.
    """
    marker = uuid.uuid4().hex
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_A_USERS}
    log = folder / f"output-{marker}.txt"
    start = time.time()
    try:
        with log.open("wb") as file:  # not a pipe: a process that stays behind would keep it open
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder,
                env={**inherited, "COLUMNS": "200", **(environment or {}), _MARKER: marker},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            stuck = [_describe(p) for p in _marked(marker)]
            text = log.read_text(errors="replace")
            raise AssertionError(f"Not finished after {timeout} s: {stuck}\n{text}") from error
        end = time.time() + patience
        while _marked(marker) and time.time() < end:
            time.sleep(0.05)
        finished = time.time()
        left = [_describe(p) for p in _marked(marker)]
        since = mark.stat().st_mtime if mark is not None and mark.exists() else None
        assert since is None or since > start
        text = log.read_text(errors="replace")
        return Finished(code, text, left, None if since is None else finished - since)
    finally:
        for left_over in _marked(marker):
            left_over.send_signal(signal.SIGKILL)


def side_by_side(commands: Mapping[T, Callable[[], Finished]]) -> dict[T, Callable[[], Finished]]:
    """Runs them at once, and gives what each of them returned or raised.

    Most of their time they import, the launcher before the ranks that it starts, so that two cores are enough for two.
    """
    with ThreadPoolExecutor(2) as executor:
        started = {name: executor.submit(run) for name, run in commands.items()}
    return {name: future.result for name, future in started.items()}


def script_of_environment(name: str) -> Path:
    """A console script that was installed with the running interpreter."""
    return Path(sys.executable).parent / name


def _marked(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # another user's, or gone
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}"


def write_text(folder: Path, num_files: int = 6, num_bytes: int = 12_000) -> Path:
    """A folder of small Python files, enough for a few steps of every config."""
    folder.mkdir(parents=True)
    for i in range(num_files):
        lines = (f"def function_{i}_{j}(x):\n    return x + {j * 7919 % 1000}\n\n" for j in range(num_bytes))
        text = ""
        while len(text) < num_bytes:
            text += next(lines)
        (folder / f"file_{i}.py").write_text(text)
    return folder
