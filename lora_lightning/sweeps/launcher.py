"""The default launcher of sweeps, which runs each job as a fresh process with its own config.

Under DDP, Lightning starts the other ranks with the command line of rank 0. For a job, that
command is `train resume=<job folder>`. All ranks thus read one saved config, and none starts its
own sweep.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from lora_lightning.config.compose import config_hash, direction
from lora_lightning.config.paths import anchor
from lora_lightning.config.saved import read_config, read_overrides
from lora_lightning.config.schema import LOG, PAUSE, SWEEP
from lora_lightning.errors import UserError
from lora_lightning.training.callbacks.graceful_stop import raise_on_signals
from lora_lightning.utils.atomic_write import atomic_write, remove_debris
from lora_lightning.utils.locks import locked
from lora_lightning.utils.output_folders import made_folder
from lora_lightning.utils.terminal import say

from .folder import note
from .halving import Halving
from .live_table import JobTable
from .queue import (
    EXIT_USER_ERROR,
    Job,
    JobQueue,
    Work,
)
from .report import report

EVENTS, CURVES = "lora_lightning.callbacks.EventsLogger", "tensorboard"
"""Our TensorBoard logger, and its folder name in a run that is not a job."""


class SweepError(Exception):
    """Failure of sweep jobs that is not a mistake of the user."""


class ProcessLauncher(Launcher):
    """Launcher that runs the jobs of a sweep as processes, from a queue.

    On GPUs, the queue spreads over the devices. On a CPU, it runs a set number of jobs at a time.
    A sweep that is run again into its folder keeps the complete jobs. It resumes the others from
    their last checkpoints.

    Args:
        jobs: number of jobs at a time; "auto": one for each set of GPUs, one on a CPU.
        gpus_per_job: GPUs per job; "auto": trainer.devices if that is a number, else one.
        fail_fast: whether the first failure stops the sweep; otherwise the other jobs continue.
        halving: eta and rungs of successive halving; None: all jobs train to their end.
        retries: how often a failed job is restarted from its last checkpoint. A mistake of the user
            is not retried.
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
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if value != "auto" and not whole:
                raise UserError(
                    f"launcher.{name} must be a whole number, 1 or more, or auto, got {value!r}."
                )
        if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
            raise UserError(f"launcher.retries must be a whole number, 0 or more, got {retries!r}.")
        self.retries = retries
        self.jobs = jobs
        self.gpus_per_job = gpus_per_job
        self.fail_fast = fail_fast
        Halving.of(halving, "max")  # report a mistake before anything is written
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
            made_folder(sweep_dir)
        except OSError as error:
            raise UserError(f"hydra.sweep.dir={sweep_dir} cannot be made: {error}.") from None
        with locked(sweep_dir, setting="hydra.sweep.dir") as held:
            remove_debris(sweep_dir / SWEEP)
            planned = [
                self._plan(sweep_dir, number, list(overrides))
                for number, overrides in enumerate(job_overrides, initial_job_idx)
            ]
            for job, config in planned:
                if job.state not in ("kept", "stopped") or not _is_saved(job):
                    _save(config, job)
            jobs = [job for job, _ in planned]
            _name(jobs)
            first = planned[0][1]
            halving = Halving.of(self.halving, direction(first))
            if halving is not None:
                halving.check(jobs)
            note(sweep_dir, self._overrides(), "running")
            with raise_on_signals(), JobTable(sweep_dir, jobs, str(first.task.monitor)) as table:
                JobQueue(
                    jobs,
                    lambda idle: self._next(planned, halving, idle=idle),
                    self._places(first),
                    fail_fast=self.fail_fast,
                    retries=self.retries,
                    show=table.show,
                    inherit=(held.fileno(),),
                ).run()
            if halving is not None and not any(job.state == "waiting" for job in jobs):
                halving.stop(jobs)
            if any(job.result() for job in jobs):
                try:
                    report(sweep_dir)
                except UserError as error:
                    say(f"warning: there is no report: {error}", file=sys.stderr)
            failure = _failure(jobs)
            note(sweep_dir, self._overrides(), "completed" if failure is None else "failed")
        return [_returned(job, config, failure) for job, config in planned]

    def _next(
        self, planned: list[tuple[Job, DictConfig]], halving: Halving | None, *, idle: bool
    ) -> list[Work]:
        """Return the work to start now: all waiting jobs, or those that halving selects."""
        jobs = [job for job, _ in planned]
        if halving is None:
            chosen = [job for job in jobs if job.state == "waiting"]
            for job in chosen:
                (job.folder / PAUSE).unlink(missing_ok=True)  # left by a sweep with halving
        else:
            chosen = halving.choose(jobs, idle=idle)
            for job in chosen:
                halving.prepare(job)
        return self.divide([pair for pair in planned if pair[0] in chosen])

    def divide(self, planned: list[tuple[Job, DictConfig]]) -> list[Work]:
        """Return the work of each process: one job."""
        return [Work([job]) for job, _ in planned]

    def _overrides(self) -> list[str]:
        given = self.config.hydra.overrides
        return [*given.task, *given.hydra]

    def _plan(self, sweep_dir: Path, number: int, overrides: list[str]) -> tuple[Job, DictConfig]:
        """Return a job with its config, and set its state if an earlier sweep has run it."""
        overrides = [item for item in overrides if not item.lstrip("+").startswith("launcher.")]
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        folder = sweep_dir / str(config.hydra.sweep.subdir)
        with open_dict(config):
            config.hydra.runtime.output_dir = str(folder)
            config.output_dir = str(folder)
        varied = self._varied(overrides)
        name_curves(config, folder, varied)
        anchor(config, Path.cwd())
        if os.path.lexists(folder):
            from lora_lightning.training.run_folder import job_conflicts

            if lost := job_conflicts(folder):
                raise UserError(
                    f"{folder} holds what this sweep did not write. This would be lost: "
                    f"{', '.join(filter(None, lost)) or folder}. Give another folder: "
                    "hydra.sweep.dir=DIR."
                )
        job = Job(number, list(filter_overrides(overrides)), folder)
        held = _held(job)
        if held not in (None, config_hash(_own(config))):
            raise UserError(
                f"{folder} holds a job with other settings, so this is not the sweep that "
                f"{sweep_dir} was made by. Give another folder: hydra.sweep.dir=DIR. (A sweeper "
                "that samples proposes the same jobs again if hydra.sweeper.sampler.seed is set.)"
            )
        if held is not None:
            status = str(job.result().get("status"))
            if status == "completed":
                job.state = "kept"
            elif self.halving is not None and status in ("paused", "stopped"):
                job.state = status
        return job, config

    def _varied(self, overrides: list[str]) -> dict[str, str]:
        """Return a job's values of the varied settings, by key."""
        parser = OverridesParser.create()
        typed = parser.parse_overrides(list(self.config.hydra.overrides.task))
        fixed = {item.get_key_element() for item in typed if not item.is_sweep_override()}
        return {
            item.get_key_element().lstrip("+"): item.get_value_element_as_str()
            for item in parser.parse_overrides(list(filter_overrides(overrides)))
            if item.get_key_element() not in fixed
        }

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
                f"a job needs {each} GPUs and {len(gpus)} are visible: lower trainer.devices or "
                "launcher.gpus_per_job."
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


SHORT = {"lora.rank": "r", "lora.alpha": "a", "seed": "s"}
"""Abbreviations of settings in the name of a curve."""
LONGEST = 120
"""Maximum length of a curve's name, which is also a folder name."""


def curves_name(varied: dict[str, str]) -> str:
    """Return the TensorBoard name of a job's curves, after its number: `r16 a32 lr=0.001 s1`.

    It is a valid folder name.
    """
    last = {"seed": 2, "lora.rank": -2, "lora.alpha": -1}
    keys = sorted(varied, key=lambda key: last.get(key, 0))
    parts = [
        f"{SHORT[key]}{varied[key]}" if key in SHORT else f"{key.split('.')[-1]}={varied[key]}"
        for key in keys
    ]
    return re.sub(r"[^\w.=+ -]", "_", " ".join(parts), flags=re.ASCII)[:LONGEST].strip(" .")


def name_curves(config: DictConfig, folder: Path, varied: dict[str, str]) -> None:
    """Make a job write its curves under a name that distinguishes it within its sweep.

    A job that has already begun keeps its folder, even if an earlier version began it.
    """
    logger = config.logger.get("tensorboard")
    name = curves_name(varied)
    ours = isinstance(logger, DictConfig) and logger.get("_target_") == EVENTS
    if not ours or not name or logger.get("name") != CURVES or (folder / CURVES).is_dir():
        return
    with open_dict(config):
        logger.name = name
        logger.varied = list(varied)


def _name(jobs: list[Job]) -> None:
    """Name each job by the overrides that not all jobs have."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        job.name = " ".join(item for item in job.overrides if item not in common)


def _own(config: DictConfig) -> DictConfig:
    """Return a job's config without Hydra's part."""
    own = config.copy()
    with open_dict(own):
        own.pop("hydra", None)
    return own


def _held(job: Job) -> str | None:
    """Return the hash of the config in a job's folder; None if no job has begun there.

    If a power cut has damaged config.yaml, the hash comes from result.json. A config with the same
    hash may then replace the damaged one.

    Raises:
        UserError: neither file gives the hash, and the job has trained.
    """
    try:
        return config_hash(read_config(job.folder / ".hydra" / "config.yaml"))
    except UserError as error:
        recorded = job.result().get("config_hash")
        if recorded is None and any((job.folder / "checkpoints").glob("*")):
            raise UserError(
                f"{error} Its result.json does not tell either what its checkpoints were trained "
                f"with. Delete {job.folder}, and the sweep trains this job from the start."
            ) from None
        return None if recorded is None else str(recorded)


def _is_saved(job: Job) -> bool:
    """Return whether the files that `_save` writes can be read, as a report needs."""
    try:
        read_config(job.folder / ".hydra" / "config.yaml")
        read_overrides(job.folder / ".hydra" / "overrides.yaml")
    except UserError:
        return False
    return True


def _save(config: DictConfig, job: Job) -> None:
    """Write .hydra/, from which the job's process and a later sweep read the job's settings."""
    folder = job.folder / ".hydra"
    try:
        made_folder(folder)
        hydra = OmegaConf.masked_copy(config, "hydra")
        for name, content in (
            ("hydra.yaml", hydra),
            ("overrides.yaml", config.hydra.overrides.task),
            ("config.yaml", _own(config)),
        ):
            atomic_write(folder / name, OmegaConf.to_yaml(content))
    except OSError as error:
        raise UserError(f"hydra.sweep.dir: {folder} cannot be written: {error}.") from None


def _failure(jobs: list[Job]) -> Exception | None:
    """Return the error that reports the failed jobs; None if no job failed."""
    failed = [job for job in jobs if job.state == "failed"]
    left = [job for job in jobs if job.state in ("waiting", "interrupted")]
    if not failed:
        return None
    lines = [f"{len(failed)} of {len(jobs)} jobs failed."]
    for error, jobs_with in _by_error(failed).items():
        first, *others = jobs_with
        also = f" and {len(others)} more" if others else ""
        lines.append(
            f"  job {first.number} ({first.name}){also}: {error} Log: {first.folder / LOG}"
        )
    if left:
        lines.append(f"  {len(left)} others were not finished, because of launcher.fail_fast.")
    lines.append("The same command runs these again and keeps what is complete.")
    mistakes = all(job.status == EXIT_USER_ERROR for job in failed)
    return (UserError if mistakes else SweepError)("\n".join(lines))


def _by_error(failed: list[Job]) -> dict[str, list[Job]]:
    """Group jobs by error, because a wrong setting of the sweep fails in each of its jobs."""
    found: dict[str, list[Job]] = {}
    for job in failed:
        found.setdefault(job.error(), []).append(job)
    return found


def _returned(job: Job, config: DictConfig, failure: Exception | None) -> JobReturn:
    ok = job.state in ("completed", "kept", "stopped")
    objective = (
        job.rungs()[-1]["value"] if job.state == "stopped" else job.result().get("objective")
    )
    return JobReturn(
        overrides=job.overrides,
        cfg=_own(config),
        hydra_cfg=OmegaConf.masked_copy(config, "hydra"),
        working_dir=str(job.folder),
        status=JobStatus.COMPLETED if ok else JobStatus.FAILED,
        _return_value=objective if ok else failure,
    )
