"""A folder's lock: who works in it holds it, and it is free when the last of them has ended."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .lora.errors import UserError

LOCK = ".lock"


_HELD: dict[Path, IO[bytes]] = {}
"""Locks that this process holds."""


@contextmanager
def locked(folder: Path, *, setting: str, patience: float = 10.0) -> Iterator[IO[bytes]]:
    """Holds a folder's lock for the time of the block; within another such block, that one's.

    Processes that are given the file keep the lock until they end.

    Args:
        folder: an existing folder.
        setting: what names another folder, for the message.
        patience: seconds; processes that were killed take a moment to end.

    Raises:
        UserError: another process keeps it.
    """
    folder = folder.resolve()
    if folder in _HELD:
        yield _HELD[folder]
        return
    try:
        handle = _open(folder, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.") from None
    with handle:
        until = time.monotonic() + patience
        while not _take(handle):
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} is in use by another process, which runs or trains in it. Wait for "
                    f"it, or give another folder: {setting}=DIR."
                )
            time.sleep(0.2)
        _HELD[folder] = handle
        try:
            yield handle
        finally:
            del _HELD[folder]


def is_abandoned(folder: Path) -> bool:
    """Whether a folder was locked once and is so no more."""
    try:
        with _open(folder, os.O_RDONLY) as handle:
            return _take(handle)
    except OSError:
        return False


def _open(folder: Path, flags: int) -> IO[bytes]:
    """Opens a folder's lock file as it is; whoever made the folder may have put a link there.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    path = folder / LOCK
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither is on Windows
    handle = os.fdopen(os.open(path, flags, 0o666), "rb")
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return handle


def _take(handle: IO[bytes]) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
