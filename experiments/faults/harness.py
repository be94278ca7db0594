"""Fail each file operation of a command in turn, and check what is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
FAULTS = ("full", "broken", "short", "killed")
"""A disk that is full from then on; one failed operation; a write of half the bytes; a kill, in the
middle of a write, which "cut" turns into a power cut."""

WARNING = "warning: the report cannot be written"
"""A sweep whose jobs are complete may end well with this alone."""
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""A fork has none of its parent's threads, and OpenMP would wait for them forever."""


class Operation(NamedTuple):
    """One line of the log.

    Args:
        number: Its place.
        name: Kind and path, without random parts and times.
        kind: create, truncate, open, write, sync, rename, exchange, mkdir, unlink, rmdir, cut.
        path: Path of the file.
        other: Path that it is renamed to.
        inode: Inode of the file that is written or synced.
        size: Size before the operation.
    """

    number: int
    name: str
    kind: str
    path: str
    other: str
    inode: int
    size: int


@dataclass
class Trial:
    """Outcome of a command with one failed operation.

    Args:
        name: Name of the operation.
        nth: Its number among the operations of that name.
        fault: One of FAULTS, or "cut".
        status: Exit status of the command.
        errors: Its standard error.
        second_status: Exit status of the same command, run again.
        second_errors: Its standard error.
        problem: What is wrong; "" if nothing is.
    """

    name: str
    nth: int
    fault: str
    status: int
    errors: str
    second_status: int = 0
    second_errors: str = ""
    problem: str = ""


@dataclass
class Harness:
    """A process that runs commands in a folder, and the outcome that they should have.

    Args:
        work: Folder of the harness.
        inputs: Folder with the inputs of the commands.
        arguments: Arguments of the command.
        outcome: Function that returns the outcome to compare, from the folder of the command.
        before: Commands that run first, without a fault, and load all modules.
        away: Folders made by `before` that are removed.
        only: Text in the names of the operations that fail.
        jobs: Whether operations of a sweep's jobs fail too, and not only those of its launcher.
    """

    work: Path
    inputs: Path
    arguments: list[str]
    outcome: Callable[[Path], Any]
    before: list[list[str]] = field(default_factory=list)
    away: tuple[str, ...] = ()
    only: str = ""
    jobs: bool = False

    def __post_init__(self) -> None:
        library = self.work / "faulty.so"
        self.root, self.graves = self.work / "root", self.work / "graves"
        flags = ["-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty.c"), "-ldl"]
        subprocess.run(["cc", *flags], check=True)
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ALONE, "LD_PRELOAD": str(library)},
        )
        self._fresh()
        for command in self.before:
            status, errors = self._send(command, kind="warm")
            assert status == 0, errors
        for name in self.away:
            shutil.rmtree(self.root / name)
        self.inputs = Path(shutil.copytree(self.root, self.work / "inputs", symlinks=True))
        self._fresh()
        status, errors = self._send(self.arguments)
        assert status == 0, errors
        self.operations = self._log()
        self.expected = self.outcome(self.root)

    def close(self) -> None:
        """End the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def places(self) -> list[tuple[str, int]]:
        """Return the operations that fail: name, and number among those of that name."""
        counts: Counter[str] = Counter()
        places = []
        for operation in self.operations:
            counts[operation.name] += 1
            if self.only in operation.name:
                places.append((operation.name, counts[operation.name]))
        return places

    def trials(self, name: str, nth: int, fault: str) -> Iterator[Trial]:
        """Fail one operation, and run the same command again.

        Args:
            name: Name of the operation.
            nth: Its number among the operations of that name.
            fault: One of FAULTS; "killed" also gives "cut", from the same kill.
        """
        self._fresh()
        status, errors = self._send(self.arguments, name, nth, fault)
        wrong = self._wrong(status, errors, fault)
        trial = Trial(name, nth, fault, status, errors, problem=wrong)
        if fault != "killed":
            yield self._run_again(trial)
            return
        saved, log = self.work / "saved", self._log()
        shutil.rmtree(saved, ignore_errors=True)
        self.root.rename(saved)
        shutil.copytree(saved, self.root, symlinks=True)
        yield self._run_again(trial)
        shutil.rmtree(self.root)
        saved.rename(self.root)
        self._drop_unsynced(log)
        yield self._run_again(Trial(name, nth, "cut", status, errors))

    def after_the_end(self) -> Trial:
        """Return the trial of a power cut after the command's end: nothing may be lost."""
        self._fresh()
        status, errors = self._send(self.arguments)
        self._drop_unsynced(self._log())
        trial = Trial("the end", 1, "cut", status, errors)
        if self.outcome(self.root) != self.expected:
            trial.problem = "written files are lost"
        return trial

    def _wrong(self, status: int, errors: str, fault: str) -> str:
        if fault == "killed":
            return "" if status in (-9, 0) else f"status {status}"
        if status == 0:
            same = self.outcome(self.root) == self.expected or WARNING in errors
            return "" if same else "ended well, with another outcome"
        if status != 2 or "Traceback" in errors:
            return f"status {status}"
        messages = [line for line in errors.splitlines() if line.startswith("error: ")]
        return "" if len(messages) == 1 else "no single message"

    def _run_again(self, trial: Trial) -> Trial:
        trial.second_status, trial.second_errors = self._send(self.arguments)
        if trial.second_status != 0:
            trial.problem = trial.problem or f"status {trial.second_status} the second time"
        elif self.outcome(self.root) != self.expected:
            trial.problem = trial.problem or "another outcome the second time"
        return trial

    def _fresh(self) -> None:
        for folder in (self.root, self.graves):
            shutil.rmtree(folder, ignore_errors=True)
        self.graves.mkdir()
        shutil.copytree(self.inputs, self.root, symlinks=True)

    def _send(
        self, arguments: list[str], name: str = "", nth: int = 0, kind: str = "none"
    ) -> tuple[int, str]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        log, errors = self.work / "log", self.work / "errors"
        log.unlink(missing_ok=True)
        request = {
            **{"root": str(self.root), "log": str(log), "graves": str(self.graves)},
            **{"name": name, "nth": nth, "kind": kind, "errors": str(errors)},
            **{"arguments": arguments, "jobs": self.jobs},
        }
        print(json.dumps(request), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        return status, errors.read_text(errors="replace")

    def _log(self) -> list[Operation]:
        operations = []
        for line in (self.work / "log").read_text().splitlines():
            number, name, kind, path, other, inode, size = line.split("\t")
            operations.append(
                Operation(int(number), name, kind, path, other, int(inode), int(size))
            )
        return operations

    def _drop_unsynced(self, log: list[Operation]) -> None:
        """Remove names and contents that a power cut would lose, because no sync followed them.

        Any later sync keeps a name, as in a journal. Contents need a sync of their own file.
        """
        dirty: dict[int, int] = {}  # inode: bytes on the disk
        synced = -1
        for index, operation in enumerate(log):
            if operation.kind == "sync":
                synced = index
                dirty.pop(operation.inode, None)
            elif operation.kind == "write":
                dirty.setdefault(operation.inode, operation.size)
        for operation in reversed(log[synced + 1 :]):
            self._undo(operation)
        for path in self.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                size = dirty.get(path.stat().st_ino)
                if size is not None:
                    os.truncate(path, size)

    def _undo(self, operation: Operation) -> None:
        path, other = Path(operation.path), Path(operation.other)
        grave = self.graves / str(operation.number)
        if operation.kind == "create":
            path.unlink(missing_ok=True)
        elif operation.kind == "mkdir":
            shutil.rmtree(path, ignore_errors=True)
        elif operation.kind == "rmdir":
            path.mkdir(exist_ok=True)  # it failed if the folder was not empty
        elif operation.kind == "unlink" and grave.exists():
            os.link(grave, path)
        elif operation.kind == "rename":
            if not other.exists():  # renamed onto itself, or by an unwatched call
                return
            other.rename(path)
            if grave.exists():
                os.link(grave, other)
        elif operation.kind == "exchange":
            between = path.with_name(path.name + ".between")
            path.rename(between)
            other.rename(path)
            between.rename(other)
