"""Run commands in forks of this process, each with one file operation that fails.

Standard input has a request per line, as JSON; standard output has the exit statuses. `faulty.c` is
loaded before libc.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_lightning.sweeps import job_process

KINDS = ("none", "full", "broken", "killed", "short")
PATIENCE = 180
"""Seconds after which SIGALRM ends a command."""
SPARES = 3
"""Forks made for the jobs of a sweep, in advance."""
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None)


class Spare:
    """A fork that waits to become a job of a sweep, with all modules loaded and no other state.

    A new process takes ten times as long as the job.
    """

    waiting: list[Spare] = []

    def __init__(self, request: dict[str, Any]) -> None:
        self.socket, other = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            for spare in (*Spare.waiting, self):  # else they would not see the end of the command
                spare.socket.close()
            message, descriptors, _, _ = socket.recv_fds(other, 65536, 16)
            if not message:
                os._exit(0)
            status = 1
            try:
                status = run_job(request, json.loads(message), descriptors)
            finally:
                os._exit(status)
        other.close()


class Job:
    """What the queue uses of `subprocess.Popen`, with a spare as the process."""

    def __init__(
        self, command: list[str], *, env: dict[str, str], stdout: Any, pass_fds: Any, **_: Any
    ) -> None:
        spare = Spare.waiting.pop()
        self.pid, self.returncode = spare.pid, None
        reads, writes = os.pipe()
        message = json.dumps({"command": command, "env": env}).encode()
        socket.send_fds(spare.socket, [message], [reads, stdout.fileno(), *pass_fds])
        spare.socket.close()
        os.close(reads)
        self.stdin = os.fdopen(writes, "wb")

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("job", timeout)
            time.sleep(0.05)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run_job(request: dict[str, Any], job: dict[str, Any], descriptors: list[int]) -> int:
    """Run a job of a sweep, and return its exit status."""
    os.setsid()
    signal.alarm(PATIENCE)
    for stream, descriptor in ((0, descriptors[0]), (1, descriptors[1]), (2, descriptors[1])):
        os.dup2(descriptor, stream)
    os.closerange(3, min(descriptors))
    os.close(descriptors[0])
    os.close(descriptors[1])
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(request["root"])
    if request["jobs"]:
        arm(request, joins=True)
    module, *arguments = job["command"][2:]
    return exit_status(module, arguments)


def arm(request: dict[str, Any], *, joins: bool = False) -> None:
    """Make the requested operation of this process fail."""
    texts = [request[key].encode() for key in ("root", "log", "graves", "name")]
    LIBC.fault_arm(*texts, request["nth"], KINDS.index(request["kind"]), joins)


def run_command(arguments: list[str], errors: str) -> int:
    """Run a command, keep only what it prints to standard error, and return its exit status."""
    for stream, path in ((0, os.devnull), (1, os.devnull), (2, errors)):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags, 0o644), stream)
    return exit_status("lora_lightning", arguments)


def exit_status(module: str, arguments: list[str]) -> int:
    """Run a module as `python -m` does, and return its exit status."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with suppress(OSError):  # the log of a job may be on a full disk
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


def answer(request: dict[str, Any]) -> int:
    """Run a command in a fork; return its exit status, or minus the number of its signal."""
    before = children()
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        for _ in range(SPARES):
            Spare.waiting.append(Spare(request))
        job_process.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Job})
        os.chdir(request["root"])
        arm(request)
        os._exit(run_command(request["arguments"], request["errors"]))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    while children() - before:  # the jobs of a command that was killed
        os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)
    return status


def children() -> set[str]:
    """Return the process ids of the children of this process."""
    files = Path("/proc/self/task").glob("*/children")
    return {pid for file in files for pid in file.read_text().split()}


if __name__ == "__main__":
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        if request["kind"] == "warm":  # in this process, so that the forks have all modules
            os.chdir(request["root"])
            status = run_command(request["arguments"], request["errors"])
        else:
            status = answer(request)
        print(status, file=answers, flush=True)
