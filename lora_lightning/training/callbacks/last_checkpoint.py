"""The callback that keeps the last checkpoint, which a stopped run resumes from."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map

from lora_lightning.lora import UserError
from lora_lightning.training.checkpointing import (
    check_trainable_values,
    check_written,
)
from lora_lightning.training.lightning_internals import (
    can_resume_here,
    counts_after_batch,
    counts_at_step_end,
    reset_counts,
)
from lora_lightning.utils.atomic_write import written_beside
from lora_lightning.utils.output_folders import create_folder, sync
from lora_lightning.utils.run_folder import LAST, PREVIOUS
from lora_lightning.utils.terminal import say

from .best_checkpoint import save_to
from .graceful_stop import Stopped, StopSignals
from .halving_pause import HalvingPause, Paused
from .rank_messages import SharedNumber


class _Caught(TorchCheckpointIO):
    """A checkpoint writer that keeps the content in memory and writes no file."""

    content: Any = None

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.content = checkpoint


class LastCheckpoint(Checkpoint):
    """A callback that keeps `last.ckpt`, for an exact resume of a killed run, and its predecessor.

    It saves every few minutes or optimizer steps and after every epoch. At these points no
    gradient is partly accumulated, and every callback has seen a validation that was due. Rank 0
    copies the state to host memory. A thread writes it, reads it again and compares, while
    training continues. Writing is atomic, so a kill during a write leaves the previous file.

    In a run of one process, it also saves when an exception or Ctrl-C ends training. It then saves
    the state after the last whole step. With several processes it does not, since the others may
    wait for the failed process.

    Args:
        folder: Folder of last.ckpt.
        every_n_minutes: Minutes between two saves. Defaults to 5.0. None disables saving by time.
        every_n_steps: Optimizer steps between two saves. Defaults to None, which disables saving
            by steps.
    """

    def __init__(
        self,
        folder: str,
        every_n_minutes: float | None = 5.0,
        every_n_steps: int | None = None,
    ) -> None:
        self.path = Path(folder) / LAST
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self.signals: StopSignals | None = None
        """Signals that request the run to save and end."""
        self.pause: HalvingPause | None = None
        """Pause of the run at a rung of successive halving."""
        self._shared = SharedNumber()
        self._is_time = False
        self._signum = 0
        self._saved_at: int | None = None
        self._saved_time = 0.0
        self._last_is_whole = True
        self._whole: tuple[int, int] | None = None
        """Lightning's counts at the end of a step while weights and optimizer match it."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="last.ckpt")
        self._written: Future[None] | None = None

    @property
    def _rung(self) -> dict[str, Any] | None:
        return None if self.pause is None else self.pause.rung

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.pause = next((c for c in callbacks if isinstance(c, HalvingPause)), None)
        self.signals = next((c for c in callbacks if isinstance(c, StopSignals)), None)
        if self.signals is not None:
            self.signals.saves = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step
        self._saved_time = time.monotonic()
        # When a run resumes from the previous file, the last one is damaged or missing.
        self._last_is_whole = Path(str(trainer.ckpt_path)).name != PREVIOUS

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        minutes = (time.monotonic() - self._saved_time) / 60
        is_time = self.every_n_minutes is not None and minutes >= self.every_n_minutes
        received = 0 if self.signals is None else self.signals.received
        number = self._shared.exchange(trainer, 2 * received + is_time)
        self._whole = None
        self._signum, self._is_time = number // 2, bool(number % 2)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        steps = trainer.global_step - (self._saved_at or 0)
        due = self._is_time or (self.every_n_steps is not None and steps >= self.every_n_steps)
        if not can_resume_here(trainer):
            return
        if due or self._signum or self._rung is not None:
            self._save(trainer)
        self._whole = counts_after_batch(trainer, i)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Under max_steps, Lightning would run the end of an epoch a second time. It also does not
        # store that a run is asked to stop. In both cases the checkpoint in mid-epoch must suffice.
        if trainer.max_steps == -1 and not trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ended = 0 <= trainer.max_steps <= trainer.global_step  # possibly in mid-epoch
        if ended and trainer.global_step > (self._saved_at or 0) and self._rung is None:
            self._save(trainer)
        self._wait()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        with suppress(UserError):  # the user needs to see the original exception
            self._wait()
            begun = self._saved_at is not None  # otherwise the state is only partly restored
            if trainer.world_size > 1 or not begun or trainer.global_step == self._saved_at:
                return
            whole = self._whole or counts_at_step_end(trainer)
            if whole is not None:
                reset_counts(trainer, *whole)
                self._save(trainer)
                self._wait()
                if isinstance(exception, Exception):  # otherwise the command reports how to resume
                    at = f"the state after step {trainer.global_step}"
                    say(f"saved {at}: {self.path}", file=sys.stderr)

    def _save(self, trainer: L.Trainer) -> None:
        self._wait()
        self._saved_at, self._saved_time = trainer.global_step, time.monotonic()
        self._is_time = False
        for logger in trainer.loggers:  # a resumed run does not log these values again
            logger.save()
        usual, caught = trainer.strategy.checkpoint_io, _Caught()
        trainer.strategy.checkpoint_io = caught
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            trainer.strategy.checkpoint_io = usual
        if caught.content is not None:  # on rank 0
            content = _copied(caught.content)
            check_trainable_values(content["state_dict"])
            self._written = self._writer.submit(
                _write, self.path, content, keep=self._last_is_whole
            )
            self._last_is_whole = True
        if self._rung is not None or self._signum:
            self._wait()
        if self._rung is not None:
            raise Paused(self._rung)
        if self._signum:
            raise Stopped(self._signum)

    def _wait(self) -> None:
        """Wait until the saved state is on the disk.

        Raises:
            UserError: If it cannot be written, or reads back differently.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()


def _copied(content: Any) -> Any:
    """Return a deep copy of a checkpoint's content, with its tensors on the CPU."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        return copy.deepcopy(value)

    return tree_map(copied, content)


def _write(path: Path, content: Mapping[str, Any], *, keep: bool) -> None:
    """Write a checkpoint beside its final path, read it again, and move it there.

    Args:
        path: Final path.
        content: Content of the checkpoint.
        keep: Whether to keep the existing checkpoint too, as a disk may lose what it has written.
    """
    try:
        create_folder(path.parent)
        with written_beside(path) as beside:
            save_to(beside, dict(content))
            check_written(beside, content["state_dict"])
            if keep and path.exists():
                sync(beside)  # this may fail, so it precedes any change to the older files
                os.replace(path, path.with_name(PREVIOUS))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. The checkpoint before it is intact: free some space "
            "and resume the run."
        ) from None
