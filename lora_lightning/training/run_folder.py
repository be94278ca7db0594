"""State of a run's folder, and whether and from where the run can resume."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from lora_lightning.adapters.run_entries import HYDRA, OWN_ENTRIES, RESULT
from lora_lightning.config.compose import config_hash
from lora_lightning.config.saved import read_config
from lora_lightning.config.schema import LOG, MULTIRUN, SWEEP
from lora_lightning.lora import UserError
from lora_lightning.utils.atomic_write import is_debris
from lora_lightning.utils.logs import read_json, read_metrics, tell_damaged
from lora_lightning.utils.terminal import command, say

from .checkpointing import (
    LAST,
    PREVIOUS,
    Damaged,
    read_checkpoint,
)

CHECKPOINTS = "checkpoints"
_SHOWN = 8
_HYDRAS = b"hydra:\n"
"""First bytes of the file that Hydra writes for a sweep."""


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint that a run resumes from, or None if it was stopped before the first."""
    paths = [run_dir / CHECKPOINTS / name for name in (LAST, PREVIOUS)]
    return next((path for path in paths if path.is_file()), None)


def readable_checkpoint(run_dir: Path) -> Path | None:
    """Return the last readable checkpoint, or None if there is no checkpoint.

    Raises:
        UserError: If all existing checkpoints are damaged. The error reports the last one.
    """
    last, previous = (run_dir / CHECKPOINTS / name for name in (LAST, PREVIOUS))
    if not (last.is_file() and previous.is_file()):
        return last_checkpoint(run_dir)
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


def recorded_result(run_dir: Path) -> dict[str, Any]:
    """Return the result so far of the run in the folder."""
    return read_json(run_dir / RESULT)


def completed_result(run_dir: Path) -> dict[str, Any] | None:
    """Return the result of a completed run, or None if it is not completed."""
    result = recorded_result(run_dir)
    return result if result.get("status") == "completed" else None


def check_same_run(run_dir: Path, config: DictConfig) -> None:
    """Raise UserError if the folder holds a run with other settings."""
    recorded = recorded_result(run_dir).get("config_hash", config_hash(config))
    if recorded != config_hash(config):
        raise UserError(
            f"{run_dir} holds a run with other settings. Give another output_dir, or resume that "
            f"run: {command('train', resume=run_dir)}."
        )


def holds_run(run_dir: Path) -> bool:
    """Return whether a run wrote the files in a folder, not something else with the same names."""
    with suppress(UserError):
        read_config(run_dir / HYDRA / "config.yaml")
        return True
    return _has_begun(run_dir)


def _has_begun(run_dir: Path) -> bool:
    return "config_hash" in recorded_result(run_dir) or last_checkpoint(run_dir) is not None


def check_unused_folder(run_dir: Path) -> None:
    """Raise UserError if the folder already holds a run, or files that a run would replace."""
    if _has_begun(run_dir):
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
    names = [name for name in OWN_ENTRIES if _is_filled(run_dir / name)]
    # A process that is killed before its run begins leaves the config.
    return [name for name in names if name != HYDRA or not holds_run(run_dir)]


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
    log = run_dir / LOG
    lost = [LOG] if log.is_symlink() else []
    if _has_begun(run_dir) or not run_dir.is_dir() or is_sweep(run_dir.parent):
        return lost
    lost += _lost(run_dir)
    if _is_filled(log) and not lost and not holds_run(run_dir):
        lost.append(LOG)
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
