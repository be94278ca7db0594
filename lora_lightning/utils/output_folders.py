"""Folders that a command writes: whole or not at all, and never over what others have written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_lightning.errors import UserError

MARK = ".written_by.json"
"""In a folder: which command wrote it, and which files."""
_SHOWN = 8
"""Files that a message names at most."""


@contextmanager
def replaced_folder(
    folder: Path, *, by: str, sources: Iterable[str | Path] = (), later: Iterable[str] = ()
) -> Iterator[Path]:
    """Gives an empty folder to fill, which is put at `folder` at the end of the block.

    What is there is replaced if the same command wrote it and nothing was added since. All files
    are on the disk by then. On Linux the two folders are swapped at once; elsewhere a kill between
    two renames is repaired when the same folder is next written.

    Args:
        folder: the final place.
        by: the command that writes, as its mark names it.
        sources: what the command reads; names of the hub are passed over.
        later: names of files that are written into the folder afterwards.

    Raises:
        UserError: the place cannot be written, or holds what would be lost.
    """
    folder = _resolved(folder)  # what a link points to is replaced, not the link
    with _held(folder.parent):
        try:
            _repair(folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error}.") from None
        refuse_loss(folder, by=by, sources=sources)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        made_folder(staging.parent)
        staging.mkdir()
        with _held(staging):
            _write_mark(staging, by, {})
            yield staging
            files = {name: _kept(staging / name) for name in _files(staging)}
            _write_mark(staging, by, {**files, **dict.fromkeys(later)})
            for path in (*staging.rglob("*"), staging):
                if path.is_file() and not path.is_symlink():
                    # safetensors lets none but the owner read, whatever the user's umask says.
                    shutil.copymode(staging / MARK, path)
                sync(path)
            with _held(folder.parent):
                refuse_loss(folder, by=by, sources=sources)  # the block may have taken hours
                _put(staging, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}. Nothing was changed there.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_loss(folder: Path, *, by: str, sources: Iterable[str | Path] = ()) -> None:
    """Raises UserError where writing a folder would replace what the command did not write.

    Args:
        folder: the final place.
        by: the command.
        sources: what it reads.
    """
    folder = _resolved(folder)
    if folder == Path.cwd():
        raise UserError(f"{folder} is the working folder, which is not replaced: give another.")
    for source in map(Path, sources):
        if source.exists() and (folder == source.resolve() or folder in source.resolve().parents):
            raise UserError(
                f"{folder} is, or holds, what {by} reads: {source}. Give another folder."
            )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder.")
    if not folder.is_dir():
        return
    written_by, known = _mark(folder)
    if written_by == by:
        left = debris("|".join(map(re.escape, known)))  # by a kill
        lost = [
            name
            for name in _files(folder)
            if not (_is_kept(folder / name, name, known) or left.fullmatch(name))
        ]
        why = f"{by} did not write all of it as it is"
    else:
        lost = _files(folder)
        why = f"{written_by or 'something other than ' + by} wrote it"
    if lost:
        more = len(lost) - _SHOWN
        names = ", ".join(lost[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        raise UserError(
            f"{folder} is not empty, and {why}. This would be lost: {names}. Give another folder, "
            "or move these away."
        )


def expanded(path: str | Path, setting: str) -> Path:
    """A path as it was typed, with `~` and `~NAME` as the home folders that they stand for.

    Args:
        path: as typed.
        setting: what it was given to, for the message.

    Raises:
        UserError: there is no such home folder, or links lead round in a ring.
    """
    try:
        found = Path(path).expanduser()
        found.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        said = "no user of that name has a home folder" if str(path)[:1] == "~" else str(error)
        raise UserError(f"{setting}={path}: {said}. Give another path.") from None
    return found


def debris(names: str) -> re.Pattern[str]:
    """The names of files that are written beside others, whose names a pattern gives."""
    return re.compile(rf"\.({names})\.[0-9a-f]{{8}}\.tmp")


def _resolved(folder: Path) -> Path:
    try:
        folder = folder.resolve()
        folder.exists()  # fails where a name is too long
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        raise UserError(f"{folder} is no place for a folder: {error}.") from None
    return folder


def _write_mark(folder: Path, by: str, files: dict[str, str | int | None]) -> None:
    content = {"by": by, "files": files}
    (folder / MARK).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _mark(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Which command wrote a folder, and its files; None where that is not known."""
    path = folder / MARK
    if not path.is_file():  # it may be anything, if others made it
        return None, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["by"]), dict(content["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}


def _kept(path: Path) -> str | int:
    """By what a file is known again: its SHA-256."""
    return 0 if path.is_symlink() or not path.is_file() else digest(path)


def _is_kept(path: Path, name: str, known: dict[str, Any]) -> bool:
    return name in known and known[name] in (None, _kept(path))


def _files(folder: Path) -> list[str]:
    """Files and links at any depth, and empty folders, without the mark."""

    def counts(path: Path) -> bool:
        return path.is_symlink() or not path.is_dir() or not any(path.iterdir())

    found = (path for path in folder.rglob("*") if path != folder / MARK and counts(path))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk; what cannot be synced is left."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        finally:
            os.close(handle)


def made_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are absent, with their names on the disk.

    Raises:
        OSError: it cannot be made.
    """
    if not path.is_dir():
        if not path.parent.is_dir():
            made_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _put(staging: Path, folder: Path) -> None:
    """Puts a folder in its place, from where the one that is there before is removed."""
    if not folder.exists():
        os.rename(staging, folder)
    elif not _swap(staging, folder):  # then staging holds what was there
        outgoing = _old(staging)
        os.rename(folder, outgoing)
        try:
            os.rename(staging, folder)
        except OSError:
            os.rename(outgoing, folder)
            raise
        shutil.rmtree(outgoing, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Swaps two folders at once; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old libc
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _old(staging: Path) -> Path:
    return staging.with_name(f"{staging.name}.old")


def _repair(folder: Path) -> None:
    """Puts back, or removes, what writers of a folder left that were killed."""
    # Whoever else gives a folder such a name puts no mark of ours into it.
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
def _held(folder: Path) -> Iterator[None]:
    """Keeps other writers out of a folder, where the system has such locks."""
    handle = _lock(folder, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _is_free(folder: Path) -> bool:
    """Whether surely no process is writing a folder."""
    handle = _lock(folder)
    if handle is None:
        return False
    os.close(handle)
    return True


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """An open folder, locked; None where another process holds it, or none can.

    Args:
        folder: a writer's own, or one that may be another's.
        wait: until it is free: others look at it for a moment.
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
