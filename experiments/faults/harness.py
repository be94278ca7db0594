"""Lets each operation on files of a command fail in turn, and looks at what is left."""

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
"""A disk that is full from then on; one operation that fails; a write of half of what it was given;
a kill, amid a write, which "cut" turns into a power cut."""

WARNING = "warning: the report cannot be written"
"""A sweep whose jobs are complete may end well with this alone."""
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""A fork has none of the threads of its parent, and OpenMP would wait for them without end."""


class Operation(NamedTuple):
    """One line of the log.

    Args:
        number: its place.
        called: kind and path, without what chance and clock give.
        kind: create, truncate, open, write, sync, rename, exchange, mkdir, unlink, rmdir, cut.
        path: of the file.
        other: where it is renamed to.
        inode: of what is written or synced.
        size: before the operation.
    """

    number: int
    called: str
    kind: str
    path: str
    other: str
    inode: int
    size: int


@dataclass
class Trial:
    """What came of a command one of whose operations failed.

    Args:
        called: the operation.
        nth: which of those that are called so.
        fault: of FAULTS, or "cut".
        status: of the command.
        errors: what it said.
        again: status of the same command afterwards.
        said: what that said.
        problem: what is wrong; empty: nothing.
    """

    called: str
    nth: int
    fault: str
    status: int
    errors: str
    again: int = 0
    said: str = ""
    problem: str = ""


@dataclass
class Harness:
    """A process that runs commands in a folder, and what they are expected to leave.

    Args:
        work: a folder of its own.
        inputs: what the commands read.
        arguments: the command.
        outcome: what the folder it runs in holds at the end that counts, to be compared.
        before: commands that run first, without a fault, and load all modules.
        away: what these leave that is taken away.
        only: text that the operations which fail have in their names.
        jobs: whether the operations of a sweep's jobs fail too, and not only those of its launcher.
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
            status, said = self._ask(command, kind="warm")
            assert status == 0, said
        for name in self.away:
            shutil.rmtree(self.root / name)
        self.inputs = Path(shutil.copytree(self.root, self.work / "inputs", symlinks=True))
        self._fresh()
        status, said = self._ask(self.arguments)
        assert status == 0, said
        self.operations = self._log()
        self.expected = self.outcome(self.root)

    def close(self) -> None:
        """Ends the process."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def places(self) -> list[tuple[str, int]]:
        """The operations that fail, as name and how many of that name came before and with it."""
        counts: Counter[str] = Counter()
        found = []
        for operation in self.operations:
            counts[operation.called] += 1
            if self.only in operation.called:
                found.append((operation.called, counts[operation.called]))
        return found

    def trials(self, called: str, nth: int, fault: str) -> Iterator[Trial]:
        """Fails one operation, and has the same command run again.

        Args:
            called: the operation's name.
            nth: which one of that name.
            fault: of FAULTS, and "killed" also gives "cut", from the same kill.
        """
        self._fresh()
        status, errors = self._ask(self.arguments, called, nth, fault)
        wrong = self._wrong(status, errors, fault)
        trial = Trial(called, nth, fault, status, errors, problem=wrong)
        if fault != "killed":
            yield self._again(trial)
            return
        saved, log = self.work / "saved", self._log()
        shutil.rmtree(saved, ignore_errors=True)
        self.root.rename(saved)
        shutil.copytree(saved, self.root, symlinks=True)
        yield self._again(trial)
        shutil.rmtree(self.root)
        saved.rename(self.root)
        self._drop_unsynced(log)
        yield self._again(Trial(called, nth, "cut", status, errors))

    def after_the_end(self) -> Trial:
        """A power cut when the command has come to its end: nothing may be lost."""
        self._fresh()
        status, errors = self._ask(self.arguments)
        self._drop_unsynced(self._log())
        trial = Trial("the end", 1, "cut", status, errors)
        if self.outcome(self.root) != self.expected:
            trial.problem = "what was written is lost"
        return trial

    def _wrong(self, status: int, errors: str, fault: str) -> str:
        if fault == "killed":
            return "" if status in (-9, 0) else f"status {status}"
        if status == 0:
            same = self.outcome(self.root) == self.expected or WARNING in errors
            return "" if same else "ended well, with another outcome"
        if status != 2 or "Traceback" in errors:
            return f"status {status}"
        told = [line for line in errors.splitlines() if line.startswith("error: ")]
        return "" if len(told) == 1 else "no single message"

    def _again(self, trial: Trial) -> Trial:
        trial.again, trial.said = self._ask(self.arguments)
        if trial.again != 0:
            trial.problem = trial.problem or f"status {trial.again} the second time"
        elif self.outcome(self.root) != self.expected:
            trial.problem = trial.problem or "another outcome the second time"
        return trial

    def _fresh(self) -> None:
        for folder in (self.root, self.graves):
            shutil.rmtree(folder, ignore_errors=True)
        self.graves.mkdir()
        shutil.copytree(self.inputs, self.root, symlinks=True)

    def _ask(
        self, arguments: list[str], called: str = "", nth: int = 0, kind: str = "none"
    ) -> tuple[int, str]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        log, errors = self.work / "log", self.work / "errors"
        log.unlink(missing_ok=True)
        asked = {
            **{"root": str(self.root), "log": str(log), "graves": str(self.graves)},
            **{"name": called, "nth": nth, "kind": kind, "errors": str(errors)},
            **{"arguments": arguments, "jobs": self.jobs},
        }
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        return status, errors.read_text(errors="replace")

    def _log(self) -> list[Operation]:
        found = []
        for line in (self.work / "log").read_text().splitlines():
            number, called, kind, path, other, inode, size = line.split("\t")
            found.append(Operation(int(number), called, kind, path, other, int(inode), int(size)))
        return found

    def _drop_unsynced(self, log: list[Operation]) -> None:
        """Takes away what a power cut would: names and contents that no sync came after.

        Names are kept by any later sync, as a journal does; contents by one of their own file.
        """
        dirty: dict[int, int] = {}  # inode: bytes that are on the disk
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
                kept = dirty.get(path.stat().st_ino)
                if kept is not None:
                    os.truncate(path, kept)

    def _undo(self, operation: Operation) -> None:
        path, other = Path(operation.path), Path(operation.other)
        grave = self.graves / str(operation.number)
        if operation.kind == "create":
            path.unlink(missing_ok=True)
        elif operation.kind == "mkdir":
            shutil.rmtree(path, ignore_errors=True)
        elif operation.kind == "rmdir":
            path.mkdir(exist_ok=True)  # it failed where something was in it
        elif operation.kind == "unlink" and grave.exists():
            os.link(grave, path)
        elif operation.kind == "rename":
            if not other.exists():  # renamed onto itself, or by what is not watched
                return
            other.rename(path)
            if grave.exists():
                os.link(grave, other)
        elif operation.kind == "exchange":
            between = path.with_name(path.name + ".between")
            path.rename(between)
            other.rename(path)
            between.rename(other)
