"""Job processes: started as devices become free, watched, and stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.config.schema import LOG
from lora_lightning.errors import FULL_ERROR
from lora_lightning.utils.logs import read_result
from lora_lightning.utils.terminal import say

LIFELINE = "LORA_LIGHTNING_LIFELINE"
"""Set for a job: it ends when its standard input closes, as when the sweep is killed."""
OWN_CONFIG = "LORA_LIGHTNING_OWN_CONFIG"
"""Set for a job: its folder's config comes from this sweep's command line, classes included."""
RANK_VARIABLES = re.compile(
    r"(LOCAL_|GLOBAL_|GROUP_|NODE_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME"
    r"|(TORCHELASTIC|PMI|PMIX|OMPI|MPI|PL)_.*|SLURM_(NTASKS|PROCID|LOCALID|NODEID|STEP).*"
)
"""Variables that mark a process as one of several for Lightning; a job must not see them."""
EXIT_USER_ERROR = 2
ENDS = ("completed", "interrupted", "paused")
PATIENCE = 30.0
"""Seconds that a job has to save its state after it is asked to stop."""


@dataclass
class Job:
    """A job of a sweep and its state."""

    number: int
    overrides: list[str]
    folder: Path
    name: str = ""
    """Overrides that distinguish the job, because not all jobs have them."""
    state: str = "waiting"
    """waiting, running, completed, failed, interrupted, or kept (completed by an earlier sweep).
    Successive halving adds paused, and stopped for good."""
    status: int | None = None
    """Exit status of its process."""
    seconds: float = 0.0
    retried: int = 0
    """How often the job was restarted after a failure."""
    before: int = 0
    """Time of the last write to its result.json before its process began, in ns."""

    def result(self) -> dict[str, Any]:
        """Return its result.json as written so far."""
        return read_result(self.folder / "result.json")

    def news(self) -> dict[str, Any]:
        """Return its result.json if its current process wrote it, else an empty dict."""
        return self.result() if self.written() != self.before else {}

    def written(self) -> int:
        """Return when its result.json was written, in ns; 0 if it does not exist."""
        try:
            return (self.folder / "result.json").stat().st_mtime_ns
        except OSError:
            return 0

    def rungs(self) -> list[dict[str, Any]]:
        """Return the rungs at which it has paused: step, planned steps, and the metric there."""
        return list(self.result().get("rungs", ()))

    def error(self) -> str:
        """Return the reason for its failure, on one line."""
        told = str(self.news().get("error", "")).removeprefix("UserError: ")
        if not told:
            log = self.folder / LOG
            text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
            lines = text.replace("\0", "").split("\n")  # a power cut leaves zero bytes
            told = next((line for line in reversed(lines) if line.strip()), "")
        if self.status is not None and self.status < 0:
            killed = self.status == -signal.SIGKILL  # the system logs no reason for this
            why = "killed (out of memory?)" if killed else "ended"
            told = f"{why} by {signal.Signals(-self.status).name}. {told}"
        if self.retried:
            told = f"failed {self.retried + 1} times, at last: {told}"
        return " ".join(told.split())[:500] or f"exit status {self.status}"


def environment_of_job(
    outside: Mapping[str, str], devices: tuple[str, ...] | None, *, threads: int | None
) -> dict[str, str]:
    """Return the environment of a job: no rank variables, its own GPUs, its part of the cores.

    Args:
        outside: environment of the sweep.
        devices: entries of CUDA_VISIBLE_DEVICES; None: unchanged.
        threads: number of compute threads unless the user has set it; None: unchanged.
    """
    found = {name: value for name, value in outside.items() if not RANK_VARIABLES.fullmatch(name)}
    if devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if threads is not None:
        found.setdefault("OMP_NUM_THREADS", str(threads))
    found.pop(FULL_ERROR, None)  # set by the command line while Hydra runs the sweep
    found["PYTHONUNBUFFERED"] = "1"  # keeps the log complete, however the job ends
    found["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # print works in any locale
    found[LIFELINE] = found[OWN_CONFIG] = "1"
    return found


def end_with_parent() -> None:
    """End this job, and the ranks it has started, when the sweep's process is gone."""
    if os.environ.pop(LIFELINE, None) is None:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the job leads its own process group

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class Work:
    """The work of a process: one job, or several that train together."""

    jobs: list[Job]
    options: tuple[str, ...] = ()
    """Options of the command that trains several jobs."""
    process: subprocess.Popen[bytes] | None = None
    devices: tuple[str, ...] | None = None
    started: float = 0.0

    @property
    def command(self) -> list[str]:
        """Command line of the process."""
        folders = [str(job.folder) for job in self.jobs]
        if len(folders) == 1:
            return [sys.executable, "-m", "lora_lightning", "train", f"resume={folders[0]}"]
        return [sys.executable, "-m", "lora_lightning.sweeps.packed", *self.options, *folders]

    def start(
        self, devices: tuple[str, ...] | None, *, threads: int | None, inherit: tuple[int, ...]
    ) -> None:
        """Start the process; its output goes to the first job's log."""
        for job in self.jobs:
            job.before = job.written()
        with (self.jobs[0].folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=environment_of_job(os.environ, devices, threads=threads),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # only the sweep receives Ctrl-C, and passes it on
                pass_fds=inherit,
            )
        self.devices, self.started = devices, time.monotonic()
        for job in self.jobs:
            job.state = "running"

    def look(self) -> bool:
        """Update the state of the jobs, and return whether the process has ended."""
        assert self.process is not None
        assert self.process.stdin is not None
        status = self.process.poll()
        for job in self.jobs:
            if job.state != "running":
                continue
            job.seconds = time.monotonic() - self.started
            told = str(job.news().get("status"))
            if status is not None:
                job.status = EXIT_USER_ERROR if _is_mistake(job) else status
                job.state = told if told in ENDS else "failed"
            elif len(self.jobs) > 1 and told in ("completed", "failed", "paused"):
                job.state, job.status = told, EXIT_USER_ERROR if _is_mistake(job) else None
        if status is not None:
            self.process.stdin.close()
        return status is not None

    def ask_to_stop(self) -> None:
        """Ask the process to save its state and end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def stop(self, patience: float) -> None:
        """Wait for the process to end, and kill it after `patience` seconds."""
        assert self.process is not None
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        before = {job.number for job in self.jobs if job.state == "running"}
        self.look()
        for job in self.jobs:
            if job.number in before and job.news().get("status", "running") == "running":
                job.state = "interrupted"  # it ended before it could record this itself


def _is_mistake(job: Job) -> bool:
    return str(job.news().get("error", "")).startswith("UserError: ")


class JobQueue:
    """Queue that runs each piece of work in its own process, one process per place at a time.

    Args:
        jobs: all jobs of the sweep.
        more: function that returns the next work, called whenever a place is free. Its argument
            says whether nothing is running.
        places: GPUs of each place (entries of CUDA_VISIBLE_DEVICES), or None on a CPU.
        fail_fast: whether a failure stops the other jobs.
        retries: how often a failed job is restarted, unless the user made a mistake.
        show: function called after each change, and every half second.
        inherit: file descriptors that the processes keep open.
    """

    def __init__(
        self,
        jobs: list[Job],
        more: Callable[[bool], list[Work]],
        places: list[tuple[str, ...] | None],
        *,
        fail_fast: bool = False,
        retries: int = 0,
        show: Callable[[], None] = lambda: None,
        inherit: tuple[int, ...] = (),
    ) -> None:
        self.jobs, self.more = jobs, more
        self.waiting: list[Work] = []
        self.running: list[Work] = []
        self.free = list(places)
        self.fail_fast, self.retries = fail_fast, retries
        self.show = show
        self.inherit = inherit
        self._told = False
        shared = len(places) > 1 and places[0] is None
        self.threads = max(1, (os.cpu_count() or 1) // len(places)) if shared else None

    def run(self) -> None:
        """Run until all work has ended.

        If an exception interrupts it, the running jobs save their state first.
        """
        try:
            while self._advance():
                self._show()
                time.sleep(0.5)
        finally:
            self._stop_all()
            self._show()

    def _show(self) -> None:
        """Show the state of the jobs.

        An error of the display is reported once, and ends no job.
        """
        try:
            self.show()
        except BrokenPipeError:  # nobody reads the output anymore
            raise
        except Exception as error:
            if not self._told:
                say(f"warning: the jobs cannot be shown: {error!r}", file=sys.stderr)
            self._told = True

    def _advance(self) -> bool:
        """Collect ended work and start more; return whether there is more to do."""
        for item in list(self.running):
            if item.look():
                self.running.remove(item)
                self.free.append(item.devices)
                self._retry(item)
        if self.fail_fast and any(job.state == "failed" for job in self.jobs):
            return False
        while self.free:
            self.waiting = self.waiting or self.more(not self.running)
            if not self.waiting:
                break
            item = self.waiting.pop(0)
            item.start(self.free.pop(0), threads=self.threads, inherit=self.inherit)
            self.running.append(item)
        return bool(self.running)

    def _retry(self, item: Work) -> None:
        """Set the failed jobs of a process to waiting again, each as often as allowed."""
        for job in item.jobs:
            # A full disk or a killed worker also ends with the exit status of a user's mistake.
            mistake = _is_mistake(job) or (job.status == EXIT_USER_ERROR and not job.news())
            if job.state == "failed" and not mistake and job.retried < self.retries:
                job.state, job.retried = "waiting", job.retried + 1

    def _stop_all(self) -> None:
        for item in self.running:
            item.ask_to_stop()
        until = time.monotonic() + PATIENCE
        for item in self.running:
            item.stop(max(0.0, until - time.monotonic()))
        self.running = []
