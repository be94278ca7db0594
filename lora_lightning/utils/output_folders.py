"""Output folders: written whole or not at all, and never over files that others wrote."""

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
"""File in a folder that records which command wrote the folder, and which files."""
_SHOWN = 8
"""Maximum number of files that a message names."""


@contextmanager
def replaced_folder(
    folder: Path, *, by: str, sources: Iterable[str | Path] = (), later: Iterable[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder to fill, and put it at `folder` at the end of the block.

    An existing folder is replaced if the same command wrote it and nothing was added since. All
    files are synced to the disk before that. On Linux the two folders are swapped at once.
    Elsewhere, the next write of the same folder repairs a kill between the two renames.

    Args:
        folder: the final place.
        by: the command that writes, as its mark names it.
        sources: what the command reads. Hub names are ignored. Empty by default.
        later: names of files that are written into the folder afterwards. Empty by default.

    Raises:
        UserError: the place cannot be written, or holds files that would be lost.
    """
    folder = _resolved(folder)  # replaces the target of a link, not the link
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
                    # safetensors lets only the owner read its files, whatever the umask is.
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
    """Raise UserError if writing a folder would replace files that the command did not write.

    Args:
        folder: the final place.
        by: the command.
        sources: what the command reads. Empty by default.
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
        left = debris("|".join(map(re.escape, known)))  # left by a kill
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
    """Return a path as typed, with `~` and `~NAME` expanded to the home folders.

    Args:
        path: the path as typed.
        setting: the setting that got the path, for the message.

    Raises:
        UserError: there is no such home folder, or links form a ring.
    """
    try:
        found = Path(path).expanduser()
        found.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        said = "no user of that name has a home folder" if str(path)[:1] == "~" else str(error)
        raise UserError(f"{setting}={path}: {said}. Give another path.") from None
    return found


def debris(names: str) -> re.Pattern[str]:
    """Return a regex for the names of temporary files beside other files.

    Args:
        names: regex for the names of these other files.
    """
    return re.compile(rf"\.({names})\.[0-9a-f]{{8}}\.tmp")


def _resolved(folder: Path) -> Path:
    try:
        folder = folder.resolve()
        folder.exists()  # fails if a name is too long
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        raise UserError(f"{folder} is no place for a folder: {error}.") from None
    return folder


def _write_mark(folder: Path, by: str, files: dict[str, str | int | None]) -> None:
    content = {"by": by, "files": files}
    (folder / MARK).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _mark(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the command that wrote a folder, and its files. An unknown command is None."""
    path = folder / MARK
    if not path.is_file():  # others may have made anything of this name
        return None, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["by"]), dict(content["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}


def _kept(path: Path) -> str | int:
    """Return the SHA-256 that identifies a file, or 0 for a link or folder."""
    return 0 if path.is_symlink() or not path.is_file() else digest(path)


def _is_kept(path: Path, name: str, known: dict[str, Any]) -> bool:
    return name in known and known[name] in (None, _kept(path))


def _files(folder: Path) -> list[str]:
    """Return files and links at any depth, and empty folders, without the mark."""

    def counts(path: Path) -> bool:
        return path.is_symlink() or not path.is_dir() or not any(path.iterdir())

    found = (path for path in folder.rglob("*") if path != folder / MARK and counts(path))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk.

    Paths that cannot be synced are skipped.
    """
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    with suppress(PermissionError):  # Windows cannot open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        finally:
            os.close(handle)


def made_folder(path: Path) -> None:
    """Create a folder and its absent parents, and sync their names to the disk.

    Raises:
        OSError: the folder cannot be created.
    """
    if not path.is_dir():
        if not path.parent.is_dir():
            made_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def _put(staging: Path, folder: Path) -> None:
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


def _swap(one: Path, other: Path) -> bool:
    """Swap two folders at once, or return False if the system cannot."""
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
def _held(folder: Path) -> Iterator[None]:
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
