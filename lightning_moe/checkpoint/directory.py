"""A checkpoint appears under its name whole or not at all.

It is written into ``.writing/<name>`` beside its place, and moved there by a single rename once everything is on the
disk. Where something has that name already, the two are exchanged by one system call, so that there is no moment
without a checkpoint of that name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

_WRITING = ".writing"  # Lightning looks for checkpoints by the beginning of names, or by a part of them
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def begin(final: Path, replaces: Collection[str] = ()) -> Path:
    """Makes the empty folder that a checkpoint is written into; what an earlier, killed save left there goes.

    Args:
        final: Where the checkpoint is to stand.
        replaces: Names of files that make a folder one that may be replaced.

    Raises:
        FileExistsError: a folder with something else in it is there.
    """
    is_folder = final.is_dir() and not final.is_symlink() and any(final.iterdir())
    if is_folder and not any((final / name).exists() for name in replaces):
        raise FileExistsError(errno.EEXIST, "there is a folder with other files, which would be lost", str(final))
    writing = final.parent / _WRITING / final.name
    remove(writing)
    writing.mkdir(parents=True)
    return writing


def commit(writing: Path, final: Path) -> None:
    """Moves a folder that is complete to its place, and removes what had that name before."""
    sync(writing)
    if os.path.lexists(final) and _exchange(writing, final):
        sync(final.parent)
        remove(writing)
    else:
        # Where there are two, two renames: not one step, but the earlier one stands beside until the new one does.
        beside = earlier(final)
        if os.path.lexists(final):
            remove(beside)
            final.rename(beside)
        writing.rename(final)
        sync(final.parent)
        remove(beside)
    _remove_if_empty(writing.parent)


def earlier(final: Path) -> Path:
    """Where a checkpoint stands for the moment in which another takes its place, if that takes two steps."""
    return final.parent / _WRITING / f"{final.name}.earlier"


def sync(path: Path) -> None:
    """Makes a file, or what a folder lists, outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def abandon(writing: Path) -> None:
    """Removes what a failed save has written, as far as that is possible."""
    shutil.rmtree(writing, ignore_errors=True)
    _remove_if_empty(writing.parent)


def remove(path: Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder; nothing there is fine."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        shutil.rmtree(path)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # another save is at work there


def _exchange(one: Path, other: Path) -> bool:
    """Whether two paths could be exchanged in one step: Linux can, though not on every file system (NFS)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0
