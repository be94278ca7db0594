"""Checks of a folder before a run or a sweep: may it begin there, or resume, and from where?"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from lora_lightning.config.compose import config_hash
from lora_lightning.config.saved import read_config
from lora_lightning.config.schema import MULTIRUN, SWEEP
from lora_lightning.lora import UserError
from lora_lightning.utils.atomic_write import is_debris
from lora_lightning.utils.logs import read_json, read_metrics, tell_damaged
from lora_lightning.utils.run_folder import LAST, PREVIOUS, RunFolder
from lora_lightning.utils.terminal import command, say

from .checkpointing import (
    Damaged,
    read_checkpoint,
)

_SHOWN = 8
_HYDRAS = b"hydra:\n"
"""First bytes of the file that Hydra writes for a sweep."""


def readable_checkpoint(run_dir: Path) -> Path | None:
    """Return the last readable checkpoint, or None if there is no checkpoint.

    Raises:
        UserError: If all existing checkpoints are damaged. The error reports the last one.
    """
    run = RunFolder(run_dir)
    last, previous = (run.checkpoints / name for name in (LAST, PREVIOUS))
    if not (last.is_file() and previous.is_file()):
        return run.last_checkpoint()
    try:
        read_checkpoint(last)
    except Damaged as error:
        with suppress(UserError):
            read_checkpoint(previous)
            say(
                f"using {previous}, because the last checkpoint is damaged: {error}",
                file=sys.stderr,
            )
            return previous
    return last


def check_same_run(run_dir: Path, config: DictConfig) -> None:
    """Raise UserError if the folder holds a run with other settings."""
    recorded = RunFolder(run_dir).read_result().get("config_hash", config_hash(config))
    if recorded != config_hash(config):
        raise UserError(
            f"{run_dir} holds a run with other settings. Give another output_dir, or resume that "
            f"run: {command('train', resume=run_dir)}."
        )


def holds_run(run_dir: Path) -> bool:
    """Return whether a run wrote the files in a folder, not something else with the same names."""
    with suppress(UserError):
        read_config(RunFolder(run_dir).config)
        return True
    return RunFolder(run_dir).has_begun()


def check_unused_folder(run_dir: Path) -> None:
    """Raise UserError if the folder already holds a run, or files that a run would replace."""
    if RunFolder(run_dir).has_begun():
        raise UserError(
            f"{run_dir} already holds a run. To resume it: {command('train', resume=run_dir)}. "
            "For a new run, give another output_dir."
        )
    if lost := _lost(run_dir):
        raise UserError(
            f"{run_dir} holds {', '.join(lost)}, which a run would overwrite. Give another "
            "output_dir, or move these files away."
        )


def _lost(run_dir: Path) -> list[str]:
    """Return the names in a folder that a new run would overwrite, if no run has begun there."""
    names = [name for name in RunFolder.OWN if _is_filled(run_dir / name)]
    # A process that is killed before its run begins leaves the config.
    return [name for name in names if name != ".hydra" or not holds_run(run_dir)]


def check_sweep_folder(sweep_dir: Path) -> None:
    """Raise UserError if a sweep would replace files in a folder, or write through a link.

    The folder may hold jobs of the same sweep, and files unrelated to it.
    """
    if not sweep_dir.is_dir():
        return
    lost = [MULTIRUN] if _is_foreign_multirun(sweep_dir / MULTIRUN) else []
    if _is_filled(sweep_dir / SWEEP) and not is_sweep(sweep_dir):
        lost.append(SWEEP)
    for job in sorted(sweep_dir.iterdir()):
        if re.fullmatch(r"\d+", job.name):
            lost += [f"{job.name}/{name}".rstrip("/") for name in job_conflicts(job)]
    if lost:
        more = len(lost) - _SHOWN
        raise UserError(
            f"hydra.sweep.dir={sweep_dir} holds files of others, which the sweep would overwrite: "
            f"{', '.join(lost[:_SHOWN])}{f' and {more} more' if more > 0 else ''}. Give another "
            "folder, or move these files away."
        )


def is_sweep(folder: Path) -> bool:
    """Return whether a folder belongs to a sweep, which then owns the files of its jobs."""
    return isinstance(read_json(folder / SWEEP).get("overrides"), list)


def job_conflicts(run_dir: Path) -> list[str]:
    """Return the names that a sweep's job would replace in its folder, or write through a link.

    The empty string stands for the folder itself.

    Args:
        run_dir: Folder of the job.
    """
    if run_dir.is_symlink() or (os.path.lexists(run_dir) and not run_dir.is_dir()):
        return [""]
    log = RunFolder(run_dir).log
    lost = [log.name] if log.is_symlink() else []
    if RunFolder(run_dir).has_begun() or not run_dir.is_dir() or is_sweep(run_dir.parent):
        return lost
    lost += _lost(run_dir)
    if _is_filled(log) and not lost and not holds_run(run_dir):
        lost.append(log.name)
    return lost


def _is_foreign_multirun(path: Path) -> bool:
    """Return whether Hydra's file of a sweep is a link, or was not written by Hydra.

    Hydra writes the file in place. A full disk, a kill or a power cut leaves its beginning or
    zeros.
    """
    if path.is_symlink():
        return True
    if not os.path.lexists(path):
        return False
    try:
        begin = path.read_bytes().rstrip(b"\0")[: len(_HYDRAS)]
    except OSError:
        return True
    return not _HYDRAS.startswith(begin)


def _is_filled(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return os.path.lexists(path)
    return any(not is_debris(each) for each in path.iterdir())


def continue_csv(trainer: L.Trainer, step: int, *, first_step: int) -> None:
    """Keep the metric rows up to a step, because Lightning's CSVLogger alone starts a new file.

    Args:
        trainer: Trainer of the resumed run.
        step: Number of optimizer steps taken.
        first_step: Number of the first step in the rows.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger) or not trainer.is_global_zero:
            continue
        path = Path(logger.log_dir) / "metrics.csv"
        rows, damaged = read_metrics(path)
        tell_damaged(path, damaged)
        logger.experiment.metrics += [
            {name: value for name, value in row.items() if value != ""}
            for row in rows
            if int(row["step"]) < step + first_step
        ]
        logger.save()
