"""Job processes: started as devices come free, watched, ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIFELINE = "LORA_LIGHTNING_LIFELINE"
"""Set for a job: it ends when its standard input does, that is, when the sweep is killed."""
LOG = "log.txt"
RANK_VARIABLES = re.compile(
    r"(LOCAL_|GLOBAL_|GROUP_|NODE_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|ROLE_NAME"
    r"|(TORCHELASTIC|PMI|PMIX|OMPI|MPI|PL)_.*|SLURM_(NTASKS|PROCID|LOCALID|NODEID|STEP).*"
)
"""What tells Lightning that a process is one of several; a job must not believe it."""
PATIENCE = 30.0
"""Seconds that a job has to save its state when it is told to stop."""


@dataclass
class Job:
    """A job of a sweep, and what is known of it."""

    number: int
    overrides: list[str]
    folder: Path
    name: str = ""
    """What tells it from the others: the overrides that not all have."""
    state: str = "waiting"
    """waiting, running, completed, failed, interrupted, or kept: completed by an earlier sweep."""
    status: int | None = None
    """Exit status of the process."""
    started: float = 0.0
    seconds: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    devices: tuple[str, ...] | None = field(default=None, repr=False)

    def result(self) -> dict[str, Any]:
        """Its result.json, as far as it has come."""
        try:
            return dict(json.loads((self.folder / "result.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def error(self) -> str:
        """Why it failed, on one line."""
        told = str(self.result().get("error", "")).removeprefix("UserError: ")
        if not told:
            log = self.folder / LOG
            lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
            told = next((line for line in reversed(lines) if line.strip()), "")
        if self.status is not None and self.status < 0:
            told = f"ended by {signal.Signals(-self.status).name}. {told}"
        return " ".join(told.split())[:500] or f"exit status {self.status}"


def environment_of_job(
    outside: Mapping[str, str], devices: tuple[str, ...] | None, *, threads: int | None
) -> dict[str, str]:
    """The environment of a job: no variables of ranks, its own GPUs, its share of the cores.

    Args:
        outside: the sweep's own environment.
        devices: entries of CUDA_VISIBLE_DEVICES; None: as it is.
        threads: threads for its arithmetic where the user has not said; None: as it is.
    """
    found = {name: value for name, value in outside.items() if not RANK_VARIABLES.fullmatch(name)}
    if devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if threads is not None:
        found.setdefault("OMP_NUM_THREADS", str(threads))
    found.pop("HYDRA_FULL_ERROR", None)  # set by the command line while Hydra runs the sweep
    found[LIFELINE] = "1"
    return found


def end_with_parent() -> None:
    """Within a job: ends it, and the ranks it has started, when the sweep's process is gone."""
    if os.environ.pop(LIFELINE, None) is None:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the job leads a group of its own

    threading.Thread(target=watch, daemon=True).start()


class JobQueue:
    """Runs jobs, each in a process of its own, as many at a time as there are places.

    Args:
        jobs: what is to be run; those that are not "waiting" are left alone.
        places: GPUs of each place (entries of CUDA_VISIBLE_DEVICES), or None on a CPU.
        fail_fast: whether a failure stops the others.
        show: called with the jobs when something has happened, and every half second.
        inherit: file descriptors that jobs keep open.
    """

    def __init__(
        self,
        jobs: list[Job],
        places: list[tuple[str, ...] | None],
        *,
        fail_fast: bool = False,
        show: Callable[[list[Job]], None] = lambda jobs: None,
        inherit: tuple[int, ...] = (),
    ) -> None:
        self.jobs = jobs
        self.free = list(places)
        self.fail_fast = fail_fast
        self.show = show
        self.inherit = inherit
        shared = len(places) > 1 and places[0] is None
        self.threads = max(1, (os.cpu_count() or 1) // len(places)) if shared else None

    def run(self) -> None:
        """Until none is waiting or running. What interrupts it has the running jobs save first."""
        try:
            while self._advance():
                self.show(self.jobs)
                time.sleep(0.5)
            self.show(self.jobs)
        except BaseException:
            self._stop_all()
            self.show(self.jobs)
            raise

    def _advance(self) -> bool:
        """Takes note of jobs that have ended, starts others; whether there is more to do."""
        for job in self._running():
            self._look_at(job)
        if self.fail_fast and any(job.state == "failed" for job in self.jobs):
            self._stop_all()
            return False
        for job in self.jobs:
            if job.state == "waiting" and self.free:
                self._start(job, self.free.pop(0))
        return bool(self._running())

    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "running"]

    def _start(self, job: Job, devices: tuple[str, ...] | None) -> None:
        command = [sys.executable, "-m", "lora_lightning", "train", f"resume={job.folder}"]
        environment = environment_of_job(os.environ, devices, threads=self.threads)
        with (job.folder / LOG).open("ab") as log:
            job.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
                pass_fds=self.inherit,
            )
        job.devices, job.state, job.started = devices, "running", time.monotonic()

    def _look_at(self, job: Job) -> None:
        assert job.process is not None
        job.seconds = time.monotonic() - job.started
        job.status = job.process.poll()
        if job.status is None:
            return
        told = job.result().get("status")
        done = job.status == 0 and told == "completed"
        job.state = "completed" if done else "interrupted" if told == "interrupted" else "failed"
        assert job.process.stdin is not None
        job.process.stdin.close()
        self.free.append(job.devices)

    def _stop_all(self) -> None:
        """Asks the running jobs to save their state and end; kills those that take too long."""
        for job in self._running():
            assert job.process is not None
            job.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        for job in self._running():
            assert job.process is not None
            try:
                job.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            self._look_at(job)
            if job.state == "failed" and job.status in (-signal.SIGTERM, -signal.SIGKILL):
                job.state = "interrupted"  # it had not come far enough to say so itself
