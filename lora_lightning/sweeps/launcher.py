"""The default launcher of sweeps, which runs each job as a fresh process with its own config.

Under DDP, Lightning starts the other ranks with the command line of rank 0. For a job, that
command is `train resume=<job folder>`. All ranks thus read one saved config, and none starts its
own sweep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lora_lightning.config.compose import direction
from lora_lightning.config.presets import CONFIG_NAME
from lora_lightning.config.schema import SWEEP
from lora_lightning.errors import UserError
from lora_lightning.training.callbacks.graceful_stop import raise_on_signals
from lora_lightning.utils.atomic_write import remove_debris
from lora_lightning.utils.locks import locked
from lora_lightning.utils.output_folders import create_folder
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import say

from .folder import record_sweep, resume_command
from .grouping import group_by
from .halving import Halving
from .job import Job, name_jobs
from .job_process import EXIT_USER_ERROR, Work
from .live_table import JobTable
from .planning import is_saved, plan_job, save_job, without_hydra
from .queue import JobQueue
from .report import report


class SweepError(Exception):
    """Failure of sweep jobs that is not a mistake of the user."""


class ProcessLauncher(Launcher):
    """Launcher that runs the jobs of a sweep as processes, from a queue.

    On GPUs, the queue spreads over the devices. On a CPU, it runs a set number of jobs at a time.
    A sweep that is run again into its folder keeps the complete jobs. It resumes the others from
    their last checkpoints.

    Args:
        jobs: Number of jobs at a time. "auto" by default: one for each set of GPUs, one on a CPU.
        gpus_per_job: GPUs per job. "auto" by default: trainer.devices if that is a number, else 1.
        fail_fast: Whether the first failure stops the sweep; otherwise the other jobs continue.
            False by default.
        halving: eta and rungs of successive halving. None by default: all jobs train to their end.
        retries: How often a failed job is restarted from its last checkpoint. A mistake of the user
            is not retried. 0 by default.
    """

    __module__ = "hydra_plugins.lora_lightning"  # where Hydra looks for it, see plugin/

    def __init__(
        self,
        jobs: Any = "auto",
        gpus_per_job: Any = "auto",
        fail_fast: bool = False,
        halving: Any = None,
        retries: int = 0,
    ) -> None:
        for name, value in (("jobs", jobs), ("gpus_per_job", gpus_per_job)):
            if value != "auto" and not is_integer(value, 1):
                raise UserError(f"launcher.{name}={value!r}: must be auto or a positive integer.")
        if not is_integer(retries, 0):
            raise UserError(f"launcher.retries={retries!r}: must be an integer, 0 or more.")
        self.retries = retries
        self.jobs = jobs
        self.gpus_per_job = gpus_per_job
        self.fail_fast = fail_fast
        Halving.from_settings(halving, "max")  # report a mistake before anything is written
        self.halving = halving

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs to their end; a failed job gives a JobReturn that raises.

        Raises:
            UserError: the folder holds another sweep, or is in use.
        """
        setup_globals()
        sweep_dir = Path(self.config.hydra.sweep.dir).absolute()
        try:
            create_folder(sweep_dir)
        except OSError as error:
            raise UserError(f"hydra.sweep.dir={sweep_dir}: cannot be created: {error}.") from None
        with locked(sweep_dir, setting="hydra.sweep.dir") as lock:
            remove_debris(sweep_dir / SWEEP)
            jobs = self._plan(job_overrides, initial_job_idx)
            halving = Halving.from_settings(self.halving, direction(jobs[0].config))
            if halving is not None:
                halving.check(jobs)
            self._record(sweep_dir, "running")  # before any job's folder, which then belongs to it
            for job in jobs:
                if job.state not in ("kept", "stopped") or not is_saved(job):
                    save_job(job)
            try:
                self._run(sweep_dir, jobs, halving, lock.fileno())
            except KeyboardInterrupt:
                resume = resume_command(sweep_dir)
                say(f"The sweep has stopped. To resume it: {resume}", file=sys.stderr)
                raise
            if any(job.result() for job in jobs):
                try:
                    report(sweep_dir)
                except UserError as error:
                    say(f"warning: the report cannot be written: {error}", file=sys.stderr)
            failure = error_of_jobs(jobs)
            self._record(sweep_dir, "completed" if failure is None else "failed")
        return [_job_return(job, failure) for job in jobs]

    def _plan(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        jobs = [
            plan_job(self.context, self.config, number, list(overrides))
            for number, overrides in enumerate(job_overrides, first)
        ]
        for job in jobs:
            if self.halving is None and job.state in ("paused", "stopped"):
                job.state = "waiting"  # it trains to its end
        name_jobs(jobs)
        return jobs

    def _record(self, sweep_dir: Path, status: str) -> None:
        typed, name = self.config.hydra.overrides, self.config.hydra.job.config_name
        flags = () if name == CONFIG_NAME else ("--config-name", str(name))
        record_sweep(sweep_dir, [*typed.task, *typed.hydra], status, flags=flags)

    def _run(self, sweep_dir: Path, jobs: list[Job], halving: Halving | None, lock: int) -> None:
        config = jobs[0].config
        with raise_on_signals(), JobTable(sweep_dir, jobs, str(config.task.monitor)) as table:
            JobQueue(
                jobs,
                lambda idle: self._next_work(jobs, halving, idle=idle),
                self._places(config),
                fail_fast=self.fail_fast,
                retries=self.retries,
                show=table.show,
                inherit=(lock,),
            ).run()
        if halving is not None and not any(job.state == "waiting" for job in jobs):
            halving.stop(jobs)

    def _next_work(self, jobs: list[Job], halving: Halving | None, *, idle: bool) -> list[Work]:
        """Return the work to start now: all waiting jobs, or those that halving selects."""
        if halving is None:
            chosen = [job for job in jobs if job.state == "waiting"]
            for job in chosen:
                RunFolder(job.folder).pause.unlink(missing_ok=True)  # left by a sweep with halving
        else:
            chosen = halving.choose(jobs, idle=idle)
            for job in chosen:
                halving.prepare(job)
        return self.divide(chosen)

    def divide(self, jobs: list[Job]) -> list[Work]:
        """Return the work of each process: one job."""
        return [Work([job]) for job in jobs]

    def _places(self, config: DictConfig) -> list[tuple[str, ...] | None]:
        """Return one entry per concurrent process: its GPUs, or None on a CPU."""
        accelerator = str(config.trainer.get("accelerator", "auto"))
        gpus = [] if accelerator == "cpu" else visible_gpus()
        if not gpus:
            return [None] * (1 if self.jobs == "auto" else self.jobs)
        devices = str(config.trainer.get("devices", "auto"))
        each = self.gpus_per_job
        if each == "auto":
            each = int(devices) if devices.isdigit() else 1
        if each > len(gpus):
            raise UserError(
                f"trainer.devices={devices}: a job requires {each} GPUs, and {len(gpus)} can be "
                "used. Lower trainer.devices or launcher.gpus_per_job."
            )
        sets: list[tuple[str, ...] | None] = [
            tuple(gpus[start : start + each]) for start in range(0, len(gpus) - each + 1, each)
        ]
        return sets if self.jobs == "auto" else (sets * self.jobs)[: self.jobs]


def visible_gpus() -> list[str]:
    """Return the GPUs visible to this process, as named in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def error_of_jobs(jobs: list[Job]) -> Exception | None:
    """Return the error that reports the failed jobs; None if no job failed."""
    failed = [job for job in jobs if job.state == "failed"]
    unfinished = [job for job in jobs if job.state in ("waiting", "interrupted")]
    if not failed:
        return None
    lines = [f"{len(failed)} of {len(jobs)} jobs failed."]
    for error, (first, *others) in group_by(failed, Job.error).items():
        more = f" and {len(others)} more" if others else ""
        lines.append(
            f"  job {first.number} ({first.name}){more}: {error} Log: {RunFolder(first.folder).log}"
        )
    if unfinished:
        lines.append(f"  {len(unfinished)} others did not finish, because of launcher.fail_fast.")
    lines.append("Run the same command again to retry them. Complete jobs are kept.")
    mistakes = all(job.status == EXIT_USER_ERROR for job in failed)
    return (UserError if mistakes else SweepError)("\n".join(lines))


def is_integer(value: Any, least: int) -> bool:
    """Return whether a value is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _job_return(job: Job, failure: Exception | None) -> JobReturn:
    ok = job.state in ("completed", "kept", "stopped")
    objective = (
        job.rungs()[-1]["value"] if job.state == "stopped" else job.result().get("objective")
    )
    return JobReturn(
        overrides=job.overrides,
        cfg=without_hydra(job.config),
        hydra_cfg=OmegaConf.masked_copy(job.config, "hydra"),
        working_dir=str(job.folder),
        status=JobStatus.COMPLETED if ok else JobStatus.FAILED,
        _return_value=objective if ok else failure,
    )
