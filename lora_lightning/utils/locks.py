"""Locks of folders and output files: one process holds a lock until it ends.

flock makes the lock if the file system supports it. Otherwise (Lustre mounted without flock, old
NFS), a file beside the lock file names the process that holds the lock.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lora_lightning.errors import UserError

from .output_folders import create_folder

LOCK = ".lock"
OWNER = ".owner"
"""Suffix of the file that names the holder if the file system has no locks."""
CLEARING = ".clearing"
"""Suffix of the file that a process holds while it removes a dead process's owner file."""
HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""flock's errors for a held lock. All other errors mean that there are no locks."""

_HELD: dict[Path, IO[bytes]] = {}
"""Locks that this process holds."""


@contextmanager
def locked(folder: Path, *, setting: str, patience: float = 10.0) -> Iterator[IO[bytes]]:
    """Hold a folder's lock for the duration of the block.

    A nested block uses the lock of the outer block. Processes that get the file keep the lock until
    they end, if the file system has locks. The holder may remove the lock file. Processes that wait
    for it then make another one, and the folder too.

    Args:
        folder: the folder.
        setting: the setting that names another folder, for the message.
        patience: seconds to wait, because killed processes take a moment to end. 10 by default.

    Raises:
        UserError: another process keeps the lock.
    """
    folder = folder.resolve()
    if folder in _HELD:
        yield _HELD[folder]
        return
    busy = (
        f"{folder} is in use by another process, which runs or trains in it. Wait for it, or give "
        f"another folder: {setting}=DIR."
    )
    with _held(folder / LOCK, busy=busy, patience=patience, make_folder=True) as handle:
        _HELD[folder] = handle
        try:
            yield handle
        finally:
            del _HELD[folder]


@contextmanager
def locked_output(output: Path | None, *, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock of an output file for the duration of the block.

    Args:
        output: the file, or None if there is nothing to lock.
        patience: seconds to wait, because killed processes take a moment to end. 10 by default.

    Raises:
        UserError: another process writes the file, its folder cannot be written, or an unrelated
            file has the lock's name.
    """
    if output is None:
        yield
        return
    output = output.absolute()
    lock = output.with_name(f".{output.name}{LOCK}")
    busy = (
        f"output={output} is being written by another process. Wait for it, or give another file: "
        "output=FILE."
    )
    if lock.is_file() and lock.stat().st_size:
        raise UserError(
            f"{lock} is not empty, so it is not a lock of ours, which would be removed. Move it "
            "away, or give another file: output=FILE."
        )
    with _held(lock, busy=busy, patience=patience) as handle:
        try:
            yield
        finally:
            with suppress(OSError):
                if _is_at(handle, lock) and not lock.stat().st_size:  # nobody has written to it
                    lock.unlink()


def is_abandoned(folder: Path) -> bool:
    """Return whether a folder was locked once and no longer is."""
    try:
        with open_file(folder / LOCK, os.O_RDONLY) as handle:
            free = _flock(handle, shared=True)
            if free is None:
                owner = _read_owner(_owner_path(folder / LOCK))
                return owner is None or _is_gone(owner)
            return free
    except OSError:
        return False


def open_file(path: Path, flags: int) -> IO[bytes]:
    """Open a file whose name others know and may have replaced by a link.

    Raises:
        OSError: the file cannot be opened, is a link, or is no regular file.
    """
    writes = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}[flags & os.O_ACCMODE]
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither
    number = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return os.fdopen(number, writes)


@contextmanager
def _held(
    path: Path, *, busy: str, patience: float, make_folder: bool = False
) -> Iterator[IO[bytes]]:
    """Hold a lock file for the duration of the block.

    Raises:
        UserError: another process keeps the lock (`busy`), or the file cannot be opened.
    """
    until = time.monotonic() + patience
    while True:
        try:
            if make_folder:
                create_folder(path.parent)
            handle = open_file(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            # The process that made the folder may have removed it in between.
            if make_folder and isinstance(error, FileNotFoundError) and time.monotonic() < until:
                continue
            raise UserError(f"{path} cannot be written: {error}.") from None
        with handle:
            free = _flock(handle)
            owner = _become_owner(path) if free is None else None
            try:
                if (free or owner is not None) and _is_at(handle, path):
                    yield handle
                    return
            finally:
                if owner is not None:
                    _give_back(owner, path)
        if time.monotonic() > until:
            raise UserError(busy + (_who(path) if free is None else ""))
        time.sleep(0.2)


def _is_at(handle: IO[bytes], path: Path) -> bool:
    """Return whether a path still names an open file.

    The previous holder of the lock may have removed it.
    """
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.lstat(path))
    except OSError:
        return False


def _flock(handle: IO[bytes], *, shared: bool = False) -> bool | None:
    """Lock a file, and return whether its lock was free.

    The result is None if its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in HELD_BY_ANOTHER else None
    return True


def _owner_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{OWNER}")


def _become_owner(path: Path) -> IO[bytes] | None:
    """Create the owner file of a lock and return it open, or None if another process has it.

    Raises:
        UserError: the file cannot be written.
    """
    owner = _owner_path(path)
    try:
        _clear_owner(owner)
        handle = open_file(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None
    except OSError as error:
        raise UserError(f"{owner} cannot be written: {error}.") from None
    try:
        handle.write(json.dumps({**_here(), "pid": os.getpid()}).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    except OSError as error:
        _give_back(handle, path)
        raise UserError(f"{owner} cannot be written: {error}.") from None
    return handle


def _give_back(owner: IO[bytes], path: Path) -> None:
    """Remove the owner file that this process made, if it is still the same file."""
    with suppress(OSError):  # the disk may be full, and unwritten text has no use
        if _is_at(owner, _owner_path(path)):
            _owner_path(path).unlink()
    with suppress(OSError):
        owner.close()


def _clear_owner(owner: Path) -> None:
    """Remove an owner file whose process is gone.

    Only one process at a time does this, because the file of a live one may appear any moment.
    """
    content = _read_owner(owner)
    if content is None or not _is_gone(content):
        return
    clearing = owner.with_name(f"{owner.name}{CLEARING}")
    open_file(clearing, os.O_WRONLY | os.O_CREAT | os.O_EXCL).close()
    try:
        content = _read_owner(owner)
        if content is not None and _is_gone(content):
            owner.unlink()
    finally:
        clearing.unlink()


def _read_owner(owner: Path) -> dict[str, Any] | None:
    """Return the content of an owner file, {} if it is invalid, or None if it is absent."""
    try:
        with open_file(owner, os.O_RDONLY) as handle:
            content = json.loads(handle.read(4096))
        return content if isinstance(content, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}


def _here() -> dict[str, str]:
    """Return what identifies this host, its current boot, and its pid namespace."""
    boot, pids = "", ""
    with suppress(OSError):  # only Linux has both
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "pids": pids}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Return whether an owner's process has certainly ended.

    For a process on another host this is unknown.
    """
    here, pid = _here(), owner.get("pid")
    if owner.get("host") != here["host"] or not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("boot") != here["boot"]:
        return True
    if owner.get("pids") != here["pids"]:  # a container on the same host
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # a process of another user
        return False
    return False


def _who(path: Path) -> str:
    """Return which process holds a lock, by its owner file, and how to remove its leftovers."""
    owner = _owner_path(path)
    content = _read_owner(owner) or {}
    return (
        f" The file system has no locks: {owner} says that process {content.get('pid', '?')} on "
        f"host {content.get('host', '?')} holds it. If no such process runs there any more: "
        f"rm {shlex.quote(str(owner))}*"
    )
