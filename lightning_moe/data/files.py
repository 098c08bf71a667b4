"""Finding and reading the text files of a folder, a glob or the standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

STDLIB = "stdlib"
"""The name that stands for the running Python's standard library."""

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_MAGIC = "*?["


def find_files(path: str, pattern: str, exclude: Iterable[str]) -> dict[str, Path]:
    """The files that a path stands for, not yet opened.

    Args:
        path: ``stdlib``, a folder, a file or a glob.
        pattern: Glob below a folder.
        exclude: Globs, on names below the folder, of what to leave out.

    Returns:
        Name below the folder, with ``/`` on every system -> path, sorted by name; no folders.

    Raises:
        ValueError: There is no such path, or nothing in it matches; or the pattern is not one.
    """
    root, pattern = _root_and_pattern(path, pattern)
    if os.path.isfile(root):  # unlike the methods of Path, False also where permission is missing
        return {root.name: root}
    if not os.path.isdir(root):
        raise ValueError(
            f"path={path!r}: {root} does not exist or is not accessible. Name a folder, a glob or a file of text, or "
            "'stdlib' for Python's own library."
        )
    try:
        matches = list(root.glob(pattern))
    except (ValueError, NotImplementedError, IndexError) as error:
        raise ValueError(
            f"pattern={pattern!r}: is not a glob below a folder: {error}. Use '**/*.txt', for example."
        ) from error
    exclude = list(exclude)
    files = {}
    for match in matches:
        name = match.relative_to(root).as_posix()
        in_stdlib = path != STDLIB or _NOT_STDLIB.isdisjoint(name.split("/")[:-1])
        if in_stdlib and not any(fnmatchcase(name, left_out) for left_out in exclude) and not os.path.isdir(match):
            files[name] = match
    if not files:
        but = f" and is not left out by exclude={exclude}" if exclude else ""
        raise ValueError(
            f"path={path!r}: no file below {root} matches pattern={pattern!r}{but}. Change pattern, "
            "'**/*' takes every file, or name another folder."
        )
    return dict(sorted(files.items()))


def _root_and_pattern(path: str, pattern: str) -> tuple[Path, str]:
    if path == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"]), pattern
    given = Path(path).expanduser()
    # A path that exists is taken as it is: a folder's name may contain brackets.
    if os.path.exists(given) or not any(character in path for character in _MAGIC):
        return given, pattern
    first = next(i for i, part in enumerate(given.parts) if any(character in part for character in _MAGIC))
    return Path(*given.parts[:first]), Path(*given.parts[first:]).as_posix()


def read_files(files: dict[str, Path], path: str) -> dict[str, bytes]:
    """Contents of the files; warns once how many could not be read, and leaves out empty ones.

    Args:
        files: Name -> path.
        path: The setting that they came from, for the messages.

    Returns:
        Name -> contents, in the order of ``files``; of several names for one file only the first.

    Raises:
        ValueError: No file can be read, or all are empty.
    """
    contents: dict[str, bytes] = {}
    unreadable: dict[str, str] = {}
    empty: list[str] = []
    seen: set[tuple[int, int]] = set()
    for name, file in files.items():
        try:
            if not file.is_file():  # opening a named pipe would wait for ever
                unreadable[name] = "it is not a regular file" if file.exists() else "it is a broken link"
                continue
            status = file.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            content = file.read_bytes()
        except OSError as error:
            unreadable[name] = error.strerror or type(error).__name__
            continue
        if content:
            contents[name] = content
        else:
            empty.append(name)
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        told = f"{len(unreadable)} of {len(files)} files cannot be read, {name} for example: {reason}."
        if len(unreadable) == len(files):
            raise ValueError(f"path={path!r}: {told} Make them readable, or name another folder.")
        rank_zero_warn(f"path={path!r}: {told} They are left out.")
    if not contents:
        which = f"{empty[0]} is empty" if len(empty) == 1 else f"all {len(empty)} files are empty"
        raise ValueError(f"path={path!r}: {which}. Name files with text.")
    return contents
