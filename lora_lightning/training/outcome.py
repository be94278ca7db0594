"""How a run ended: its status in result.json, and the error that the user gets."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_lightning.config.saved import settings_to_retype
from lora_lightning.distributed.environment import has_lost_another, leave
from lora_lightning.errors import ProcessLost, UserError
from lora_lightning.utils.atomic_write import fault_of_disk
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import command, say

from .callbacks.graceful_stop import Stopped, StopSignals
from .callbacks.halving_pause import Paused

_WORKER_KILLED = re.compile(r"DataLoader worker \(pid.* (killed by signal|exited unexpectedly)")


class Interrupted(KeyboardInterrupt):
    """An interruption of a run from outside, after which the run can be resumed.

    Args:
        run_dir: Folder of the run.
        signum: Number of the signal.
        config: Config of the run.
    """

    def __init__(self, run_dir: Path, signum: int, config: DictConfig) -> None:
        last = RunFolder(run_dir).last_checkpoint()
        begins = "" if last else " (from the start: no checkpoint was due yet)"
        super().__init__(f"interrupted. To resume{begins}: {resume_command(run_dir, config)}")
        self.signum = signum


def resume_command(run_dir: Path, config: DictConfig) -> str:
    """Return the command that resumes a run, with the settings that have to be typed again."""
    again: dict[str, str] = {}
    with suppress(UserError):  # this process cannot resolve an interpolation
        again = settings_to_retype(config)
    return " ".join([command("train", resume=run_dir), *map(shlex.quote, again)])


@contextmanager
def recorded_outcome(
    result: dict[str, Any], run_dir: Path, config: DictConfig, signals: StopSignals
) -> Iterator[None]:
    """Record in `result` how the block ended, and turn its error into one for the user.

    Args:
        result: Result of the run so far.
        run_dir: Folder of the run.
        config: Config of the run.
        signals: Signals that the run has received.

    Raises:
        Interrupted: If a signal or Ctrl-C ended the block.
        UserError: If the disk failed, or the run's folder is missing.
        ProcessLost: If another process of the run was killed.
    """
    try:
        yield
        result["status"] = "completed"
        leave()
    except Paused as pause:
        result["status"] = "paused"
        result["rungs"] = [*result["rungs"], pause.rung]
        result["steps"] = pause.rung["step"]
        result["objective"] = None
    except Stopped as stop:
        result["status"] = "interrupted"
        raise Interrupted(run_dir, stop.signum, config) from None
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning exits when it is interrupted
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            say(error.code, file=sys.stderr)
        result["status"] = "interrupted"
        raise Interrupted(run_dir, signal.SIGINT, config) from None
    except BaseException as error:
        if signals.received and not isinstance(error, UserError):  # its workers get the signal too
            result["status"] = "interrupted"
            raise Interrupted(run_dir, signals.received, config) from None
        reported: BaseException = error
        if not isinstance(error, UserError):
            reported = _explained(error, run_dir, resume_command(run_dir, config)) or error
        result["status"] = "failed"
        result["error"] = f"{type(reported).__name__}: {reported}"[:2000]
        if reported is not error:
            raise reported from error
        can_resume = signals.has_trained and RunFolder(run_dir).last_checkpoint() is not None
        if can_resume and not isinstance(error, UserError):
            say(f"failed. To resume: {resume_command(run_dir, config)}", file=sys.stderr)
        raise


def _explained(error: BaseException, run_dir: Path, resume: str) -> UserError | None:
    """Return the error for the user where the environment failed, or None for other errors."""
    can_resume = RunFolder(run_dir).last_checkpoint() is not None
    again = f"resume: {resume}" if can_resume else "start again"
    if (fault := fault_of_disk(error)) is not None:
        return UserError(
            f"{fault}. Nothing that was there before is lost: check the disk and {again}."
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        missing = Path(os.fsdecode(error.filename))
        if run_dir in missing.parents:
            return UserError(
                f"{missing} is missing: was {run_dir} moved or deleted while the run wrote there? "
                "Start again, with another output_dir."
            )
    if _WORKER_KILLED.search(str(error)):
        return ProcessLost(
            "a process that prepares batches was killed, as a system without free memory does. "
            f"data.num_workers=0 needs no such process; with it {again}."
        )
    if has_lost_another(error):
        return ProcessLost(
            f"another process of this run has died, or was killed. To resume: {resume}"
        )
    return None
