"""Atomic writes: files appear whole or not at all, because they are written beside their place."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_lightning.errors import UserError

from .output_folders import debris, sync

_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EIO: "the disk fails",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ESTALE: "the disk is gone",
    errno.ENODEV: "the disk is gone",
    errno.ENXIO: "the disk is gone",
    errno.EFBIG: "a file may not grow so large here",
    errno.ENAMETOOLONG: "a name is too long",
    errno.ELOOP: "links lead round in a ring",
    errno.EEXIST: "something else stands there",
    errno.ENOTDIR: "a file stands where a folder is meant",
}
_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""How tokenizers and safetensors report system errors that are no OSError in Python."""

_OF_PATHLIB = ("Could not determine home directory", "Symlink loop")


def fault_of_disk(error: BaseException | None) -> str | None:
    """Return the disk fault behind an exception, and where it occurred, or None."""
    seen: set[int] = set()  # a chain may be a ring
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, RuntimeError) and str(error).startswith(_OF_PATHLIB):
            return str(error)
        if number is None and (match := _OF_RUST.search(str(error))) is not None:
            number = int(match[1])
        if number in _FAULTS:
            return f"{_FAULTS[number]}: {error}"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a file to write, and put it at `path` at the end of the block, whole or not at all.

    The file is synced to the disk first, so a power cut leaves the old file or the new one. The
    temporary file has a unique name, so no other process and no link interferes.

    Raises:
        OSError: the file cannot be written. The previous file stays.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        os.close(os.open(beside, flags, 0o666))
        yield beside
        sync(beside)
        replace_synced(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write a text file as `written_beside` does.

    Raises:
        OSError: the file cannot be written. The previous file stays.
    """
    content = text.encode()
    with written_beside(path) as beside:
        beside.write_bytes(content)


def replace_synced(beside: Path, path: Path) -> None:
    """Give a synced file its final name, and sync the name too.

    Raises:
        OSError: the file cannot be renamed.
    """
    os.replace(beside, path)
    sync(path.parent)


def is_debris(path: Path) -> bool:
    """Return whether a file has a name that `written_beside` gives until the file is whole."""
    return debris(".+").fullmatch(path.name) is not None


def remove_debris(*paths: Path) -> None:
    """Remove the temporary files that killed processes have left beside files.

    Args:
        paths: files that only the holder of a lock writes. The caller holds this lock. A * in a
            name matches any text.
    """
    for path in paths:
        name = debris(re.escape(path.name).replace(r"\*", ".*"))
        with suppress(OSError):
            for leftover in [each for each in path.parent.iterdir() if name.fullmatch(each.name)]:
                leftover.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        atomic_write(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}.") from None
