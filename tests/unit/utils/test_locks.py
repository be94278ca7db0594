"""Two processes at a time: in one folder, at one output file, with and without flock."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from lora_lightning.lora import UserError
from lora_lightning.utils import locks as lock
from lora_lightning.utils import run_folder
from lora_lightning.utils.locks import (
    LOCK,
    OWNER,
    is_abandoned,
    locked,
    locked_output,
)
from lora_lightning.utils.run_folder import RunFolder

WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def without_flock(monkeypatch):
    """As on a file system that has no locks."""

    def refuse(number: int) -> None:
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


def hold(pipe, folder: Path) -> None:
    """Takes a run's folder when it is told to, and says how it fares."""
    said = []

    def sleep(seconds: float) -> None:
        if not said:
            said.append(pipe.send("waits"))
        wait(seconds)

    wait, lock.time.sleep = time.sleep, sleep
    run_folder.locked = partial(locked, patience=1.0)
    pipe.recv()
    try:
        with RunFolder(folder).rollback_on_mistake():
            pipe.send("holds")
            if pipe.recv() == "mistake":
                raise UserError("a mistake")
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").write_text("begun")
            pipe.send("has begun")
            pipe.recv()
    except UserError as error:
        pipe.send("refused" if "in use" in str(error) else "undone")


class Process:
    """A process that takes a folder."""

    def __init__(self, folder: Path) -> None:
        self.pipe, end = FORK.Pipe()
        self.process = FORK.Process(target=hold, args=(end, folder), daemon=True)
        self.process.start()
        end.close()

    def tell(self, word: str) -> None:
        self.pipe.send(word)

    def hear(self) -> str:
        assert self.pipe.poll(60)
        return self.pipe.recv()


@contextmanager
def processes(folder: Path, count: int):
    every = [Process(folder) for _ in range(count)]
    try:
        yield every
    finally:
        for each in every:
            each.process.kill()
            each.process.join()


@pytest.mark.parametrize("number", [0, errno.ENOSYS])
def test_one_holds_the_folder_after_a_mistaken_start(number, tmp_path, without_flock):
    """Of one that waited for it and one that came later, and what it begins stays."""
    if number:
        without_flock(number)
    folder = tmp_path / "race"
    with processes(folder, 3) as (first, second, third):
        first.tell("go")
        assert first.hear() == "holds"
        second.tell("go")
        assert second.hear() == "waits"
        first.tell("mistake")
        assert first.hear() == "undone"
        third.tell("go")
        others = {each.pipe: each for each in (second, third)}
        pipe = multiprocessing.connection.wait(list(others), 60)[0]
        holder = others.pop(pipe)
        (other,) = others.values()
        heard = holder.hear()
        if heard == "waits":  # the third, for the second
            holder, other = other, holder
            heard = holder.hear()
        assert heard == "holds"
        holder.tell("begin")
        assert holder.hear() == "has begun"
        while (heard := other.hear()) == "waits":
            pass
        assert heard == "refused"
        assert (folder / "checkpoints" / "last.ckpt").read_text() == "begun"
        assert (folder / LOCK).is_file()
        assert not is_abandoned(folder)
        holder.tell("end")
        holder.process.join(60)
        assert is_abandoned(folder)
    assert not list(folder.glob(f"*{OWNER}*"))


def test_the_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Not of one that its holder has removed after this process had opened it."""
    opened = []

    def open_file(path: Path, flags: int):
        opened.append(usual(path, flags))
        if len(opened) == 1:
            path.unlink()
            path.touch()
        return opened[-1]

    usual = lock.open_file
    monkeypatch.setattr(lock, "open_file", open_file)
    with locked(tmp_path, setting="output_dir") as held:
        assert os.path.samestat(os.fstat(held.fileno()), (tmp_path / LOCK).stat())
        assert len(opened) == 2


def test_rollback_on_mistake_keeps_what_another_process_began(tmp_path, monkeypatch):
    """By a mistaken start whose lock it has waited for."""
    folder = tmp_path / "run"

    @contextmanager
    def held(*_, **__):
        try:
            yield
        finally:
            (folder / ".hydra").mkdir()  # the other's

    monkeypatch.setattr(run_folder, "locked", held)
    with pytest.raises(UserError, match="a mistake"), RunFolder(folder).rollback_on_mistake():
        raise UserError("a mistake")
    assert (folder / ".hydra").is_dir()


@pytest.mark.parametrize("number", WITHOUT)
def test_a_folder_is_held_where_there_is_no_flock(number, tmp_path, without_flock):
    without_flock(number)
    owner = tmp_path / f"{LOCK}{OWNER}"
    with processes(tmp_path, 1) as (other,):
        with locked(tmp_path, setting="output_dir"):
            assert json.loads(owner.read_text())["pid"] == os.getpid()
            assert not is_abandoned(tmp_path)
        assert is_abandoned(tmp_path)
        assert not owner.exists()
        other.tell("go")
        assert other.hear() == "holds"
        assert not is_abandoned(tmp_path)
        said = rf"host {socket.gethostname()} holds it.*rm .*{OWNER}"
        with pytest.raises(UserError, match=rf"in use.*process {other.process.pid} on {said}"):
            with locked(tmp_path, setting="output_dir", patience=0):
                pass
        other.process.kill()
        other.process.join()
        assert is_abandoned(tmp_path)
        with locked(tmp_path, setting="output_dir", patience=0):
            assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob(f"*{OWNER}*"))


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_what_flock_says_of_a_lock_that_is_held(number, tmp_path, without_flock):
    without_flock(number)
    with pytest.raises(UserError, match=r"in use by another process.*output_dir=DIR\.$"):
        with locked(tmp_path, setting="output_dir", patience=0):
            pass
    assert not (tmp_path / f"{LOCK}{OWNER}").exists()
    assert not is_abandoned(tmp_path)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ({}, False),
        ({"boot": "before"}, True),
        ({"pid": 2**22 + 1}, True),  # above any that Linux gives
        ({"pids": "pid:[1]", "pid": 2**22 + 1}, False),
        ({"host": "elsewhere", "boot": "before", "pid": 2**22 + 1}, False),
        ({"pid": "x"}, False),
        (None, False),
    ],
)
def test_whose_owner_file_is_stale(change, stale, tmp_path, without_flock):
    """Of this host, that of an earlier start or of a process that is gone; of others none."""
    without_flock(errno.ENOSYS)
    owner = tmp_path / f"{LOCK}{OWNER}"
    content = {**lock._here(), "pid": os.getppid(), **(change or {})}
    owner.write_text("" if change is None else json.dumps(content))
    (tmp_path / LOCK).touch()
    assert is_abandoned(tmp_path) == stale
    if stale:
        with locked(tmp_path, setting="output_dir", patience=0):
            assert json.loads(owner.read_text())["pid"] == os.getpid()
        assert not owner.exists()
        return
    host = "?" if change is None else content["host"]
    with pytest.raises(UserError, match=f"{OWNER} says.*host {re.escape(host)} holds it.*rm "):
        with locked(tmp_path, setting="output_dir", patience=0):
            pass
    assert owner.exists()


def test_one_process_at_a_time_removes_a_stale_owner_file(tmp_path, without_flock):
    without_flock(errno.ENOSYS)
    owner = tmp_path / f"{LOCK}{OWNER}"
    owner.write_text(json.dumps({**lock._here(), "boot": "before", "pid": 1}))
    clearing = tmp_path / f"{LOCK}{OWNER}.clearing"
    clearing.touch()
    with pytest.raises(UserError, match=rf"rm {owner}\*"):
        with locked(tmp_path, setting="output_dir", patience=0):
            pass
    assert owner.exists()
    clearing.unlink()
    with locked(tmp_path, setting="output_dir", patience=0):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("number", [0, *WITHOUT])
def test_an_output_is_written_by_one_at_a_time(number, tmp_path, without_flock):
    if number:
        without_flock(number)
    output = tmp_path / "out.jsonl"
    with locked_output(output):
        with pytest.raises(UserError, match="out.jsonl is being written by another process"):
            with locked_output(output, patience=0):
                pass
        with locked_output(tmp_path / "other.jsonl", patience=0):
            pass
    with locked_output(output, patience=0):
        pass
    assert not list(tmp_path.iterdir())
