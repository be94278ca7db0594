"""Exchange of an output folder with a new one, which a kill cannot leave half done."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".written_by.json"
"""File in a folder that records which command wrote the folder, and which files."""


def put_folder(staging: Path, folder: Path) -> None:
    """Move a folder to its final place, and remove the folder that was there."""
    if not folder.exists():
        os.rename(staging, folder)
    elif not _swap(staging, folder):  # after a swap, staging holds the old folder
        outgoing = _old(staging)
        os.rename(folder, outgoing)
        try:
            os.rename(staging, folder)
        except OSError:
            os.rename(outgoing, folder)
            raise
        shutil.rmtree(outgoing, ignore_errors=True)


def _swap(first: Path, second: Path) -> bool:
    """Swap two folders at once, or return False if the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old libc
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _old(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}.old")


def repair_folder(folder: Path) -> None:
    """Restore or remove what killed writers of a folder have left."""
    # Folders of such a name from other programs do not contain our mark.
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}(\.old)?")
    if not folder.parent.is_dir():
        return
    named = (path for path in folder.parent.iterdir() if pattern.fullmatch(path.name))
    left = [path for path in named if not path.is_symlink() and (path / MARK).is_file()]
    for path in sorted(left, key=lambda path: not path.name.endswith(".old")):
        if not path.is_dir() or not (path.name.endswith(".old") or _is_free(path)):
            continue
        if path.name.endswith(".old"):
            staging = path.with_name(path.name.removesuffix(".old"))
            if staging.is_dir() and not _is_free(staging):
                continue
            if not folder.exists():
                os.rename(path, folder)
                continue
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder, if the system has such locks."""
    handle = _lock(folder, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _is_free(folder: Path) -> bool:
    """Return whether certainly no process is writing a folder."""
    handle = _lock(folder)
    if handle is None:
        return False
    os.close(handle)
    return True


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Return an open, locked folder, or None if another process holds it or no locks exist.

    Args:
        folder: a writer's own folder, or a folder that may belong to another writer.
        wait: whether to wait until the folder is free, since others hold it only for a moment.
            False by default.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle
