"""Output folders: written whole or not at all, and never over files that others wrote."""

from __future__ import annotations

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

from .folder_swap import MARK, held, put_folder, repair_folder

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
    with held(folder.parent):
        try:
            repair_folder(folder)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error}.") from None
        check_replaceable(folder, by=by, sources=sources)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        create_folder(staging.parent)
        staging.mkdir()
        with held(staging):
            _write_mark(staging, by, {})
            yield staging
            files = {name: _kept(staging / name) for name in _files(staging)}
            _write_mark(staging, by, {**files, **dict.fromkeys(later)})
            for path in (*staging.rglob("*"), staging):
                if path.is_file() and not path.is_symlink():
                    # safetensors lets only the owner read its files, whatever the umask is.
                    shutil.copymode(staging / MARK, path)
                sync(path)
            with held(folder.parent):
                check_replaceable(folder, by=by, sources=sources)  # the block may have taken hours
                put_folder(staging, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}. Nothing was changed there.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(folder: Path, *, by: str, sources: Iterable[str | Path] = ()) -> None:
    """Raise UserError if writing a folder would replace files that the command did not write.

    Args:
        folder: the final place.
        by: the command.
        sources: what the command reads. Empty by default.
    """
    folder = _resolved(folder)
    if folder == Path.cwd():
        raise UserError(f"{folder}: must not be the working folder. Give another folder.")
    for source in map(Path, sources):
        if source.exists() and (folder == source.resolve() or folder in source.resolve().parents):
            raise UserError(
                f"{folder}: must not be or hold what {by} reads, {source}. Give another folder."
            )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: must be a folder, and is a file.")
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
        full = Path(path).expanduser()
        full.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        said = "user not found" if str(path)[:1] == "~" else str(error)
        raise UserError(f"{setting}={path}: {said}. Give another path.") from None
    return full


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
        raise UserError(f"{folder}: cannot hold a folder: {error}.") from None
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

    paths = (path for path in folder.rglob("*") if path != folder / MARK and counts(path))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    checksum = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(2**20):
            checksum.update(chunk)
    return checksum.hexdigest()


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


def create_folder(path: Path) -> None:
    """Create a folder and its absent parents, and sync their names to the disk.

    Raises:
        OSError: the folder cannot be created.
    """
    if not path.is_dir():
        if not path.parent.is_dir():
            create_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)
