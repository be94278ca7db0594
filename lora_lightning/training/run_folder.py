"""What a run's folder holds of the run so far: whether it can be gone on with, and from where."""

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

from lora_lightning.adapters.folder import HYDRA, OWN_ENTRIES, RESULT
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
"""What Hydra's file of a sweep begins with."""


def last_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint a run goes on from; None if it was stopped before the first."""
    paths = [run_dir / CHECKPOINTS / name for name in (LAST, PREVIOUS)]
    return next((path for path in paths if path.is_file()), None)


def whole_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint that can be read; None if there is none.

    Raises:
        UserError: all that are there are damaged; it tells of the last.
    """
    last, previous = (run_dir / CHECKPOINTS / name for name in (LAST, PREVIOUS))
    if not (last.is_file() and previous.is_file()):
        return last_checkpoint(run_dir)
    try:
        read_checkpoint(last)
    except Damaged as error:
        with suppress(UserError):
            read_checkpoint(previous)
            say(f"{previous} is taken, as the one after it is not whole: {error}", file=sys.stderr)
            return previous
    return last


def earlier_result(run_dir: Path) -> dict[str, Any]:
    """The result of the run that is gone on with, as far as it came."""
    return read_json(run_dir / RESULT)


def completed_result(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has come to its end; None if it has not."""
    result = earlier_result(run_dir)
    return result if result.get("status") == "completed" else None


def refuse_other_run(run_dir: Path, config: DictConfig) -> None:
    """Raises UserError if the folder holds a run of other settings."""
    recorded = earlier_result(run_dir).get("config_hash", config_hash(config))
    if recorded != config_hash(config):
        raise UserError(
            f"{run_dir} holds a run of other settings, which cannot be gone on with by these. Give "
            f"another output_dir, or go on with that run: {command('train', resume=run_dir)}."
        )


def holds_run(run_dir: Path) -> bool:
    """Whether a run has left the files in a folder, and not something else under their names."""
    with suppress(UserError):
        read_config(run_dir / HYDRA / "config.yaml")
        return True
    return _has_begun(run_dir)


def _has_begun(run_dir: Path) -> bool:
    return "config_hash" in earlier_result(run_dir) or last_checkpoint(run_dir) is not None


def refuse_used_folder(run_dir: Path) -> None:
    """Raises UserError if the folder holds a run already, or files that a run would replace."""
    if _has_begun(run_dir):
        raise UserError(
            f"{run_dir} holds a run already. To go on with it: {command('train', resume=run_dir)}. "
            "For a new run give another output_dir."
        )
    if lost := _lost(run_dir):
        raise UserError(
            f"{run_dir} holds {', '.join(lost)}, where a run writes files of its own. Give another "
            "output_dir, or move them away."
        )


def _lost(run_dir: Path) -> list[str]:
    """What a folder without a run that has begun holds under names that a run writes."""
    names = [name for name in OWN_ENTRIES if _is_filled(run_dir / name)]
    # A start that was killed before the run began leaves its config.
    return [name for name in names if name != HYDRA or not holds_run(run_dir)]


def refuse_others_sweep(sweep_dir: Path) -> None:
    """Raises UserError if a folder holds files that a sweep would replace, or write through a link.

    The jobs of the same sweep may be there, and what it has not to do with.
    """
    if not sweep_dir.is_dir():
        return
    lost = [MULTIRUN] if _is_others_multirun(sweep_dir / MULTIRUN) else []
    if _is_filled(sweep_dir / SWEEP) and not is_sweep(sweep_dir):
        lost.append(SWEEP)
    for job in sorted(sweep_dir.iterdir()):
        if re.fullmatch(r"\d+", job.name):
            lost += [f"{job.name}/{name}".rstrip("/") for name in lost_to_job(job)]
    if lost:
        more = len(lost) - _SHOWN
        raise UserError(
            f"hydra.sweep.dir={sweep_dir} holds what this sweep did not write. This would be lost: "
            f"{', '.join(lost[:_SHOWN])}{f' and {more} more' if more > 0 else ''}. Give another "
            "folder, or move these away."
        )


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep, whose jobs' files are then its own."""
    return isinstance(read_json(folder / SWEEP).get("overrides"), list)


def lost_to_job(run_dir: Path) -> list[str]:
    """What a job of a sweep would replace in its folder, or write through a link; "" is the folder.

    Args:
        run_dir: the job's folder.
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


def _is_others_multirun(path: Path) -> bool:
    """Whether Hydra's file of a sweep is a link, or was not written by Hydra.

    Hydra writes it in place. A full disk, a kill or a power cut leaves its beginning, or zeros.
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
    """Keeps the rows up to a step; Lightning's CSVLogger alone would start a new file.

    Args:
        trainer: of the run that goes on.
        step: optimizer steps that were taken.
        first_step: the number under which its rows have the first.
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
