"""Process of a job: its environment, its start, and its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from lora_lightning.errors import FULL_ERROR
from lora_lightning.utils.run_folder import RunFolder

from .job import Job

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
FINAL_STATES = ("completed", "interrupted", "paused")
"""States that a job records itself when its process ends."""


def environment_of_job(
    environment: Mapping[str, str], devices: tuple[str, ...] | None, *, threads: int | None
) -> dict[str, str]:
    """Return the environment of a job: no rank variables, its own GPUs, its part of the cores.

    Args:
        environment: Environment of the sweep.
        devices: Entries of CUDA_VISIBLE_DEVICES; None: unchanged.
        threads: Number of compute threads unless the user has set it; None: unchanged.
    """
    job = {name: value for name, value in environment.items() if not RANK_VARIABLES.fullmatch(name)}
    if devices is not None:
        job["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if threads is not None:
        job.setdefault("OMP_NUM_THREADS", str(threads))
    job.pop(FULL_ERROR, None)  # set by the command line while Hydra runs the sweep
    job["PYTHONUNBUFFERED"] = "1"  # keeps the log complete, however the job ends
    job["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # print works in any locale
    job[LIFELINE] = job[OWN_CONFIG] = "1"
    return job


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
            job.earlier = job.result_time()
        with RunFolder(self.jobs[0].folder).log.open("ab") as log:
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

    def poll(self) -> bool:
        """Update the state of the jobs, and return whether the process has ended."""
        assert self.process is not None
        assert self.process.stdin is not None
        status = self.process.poll()
        for job in self.jobs:
            if job.state != "running":
                continue
            job.seconds = time.monotonic() - self.started
            recorded = str(job.current_result().get("status"))
            if status is not None:
                job.status = EXIT_USER_ERROR if job.is_mistake() else status
                job.state = recorded if recorded in FINAL_STATES else "failed"
            elif len(self.jobs) > 1 and recorded in ("completed", "failed", "paused"):
                job.state = recorded
                job.status = EXIT_USER_ERROR if job.is_mistake() else None
        if status is not None:
            self.process.stdin.close()
        return status is not None

    def request_stop(self) -> None:
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
        running = [job for job in self.jobs if job.state == "running"]
        self.poll()
        for job in running:
            if job.current_result().get("status", "running") == "running":
                job.state = "interrupted"  # it ended before it could record this itself
