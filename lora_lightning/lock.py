"""A folder's lock: who works in it holds it, and it is free when the last of them has ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO

from .lora.errors import UserError

LOCK = ".lock"


def lock(folder: Path, *, setting: str, patience: float = 10.0) -> IO[bytes]:
    """Takes a folder's lock, and gives the file that holds it until all who have it open end.

    Args:
        folder: an existing folder.
        setting: what names another folder, for the message.
        patience: seconds; processes that were killed take a moment to end.

    Raises:
        UserError: another process keeps it.
    """
    handle = (folder / LOCK).open("wb")
    until = time.monotonic() + patience
    while not _take(handle):
        if time.monotonic() > until:
            handle.close()
            raise UserError(
                f"{folder} is in use by another process that runs here. Wait for it, or give "
                f"another folder: {setting}=DIR."
            )
        time.sleep(0.2)
    return handle


def is_abandoned(folder: Path) -> bool:
    """Whether a folder was locked once and is so no more."""
    try:
        with (folder / LOCK).open("rb") as handle:
            return _take(handle)
    except OSError:
        return False


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
