"""Callbacks for the best checkpoints and for the last, which a stopped run resumes from."""

from __future__ import annotations

import copy
import io
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map

from lora_lightning.lora import UserError
from lora_lightning.training.checkpointing import (
    LAST,
    PREVIOUS,
    check_kept,
    check_written,
)
from lora_lightning.utils.atomic_write import written_beside
from lora_lightning.utils.output_folders import made_folder, sync
from lora_lightning.utils.terminal import say

from .graceful_stop import SharedNumber, Stopped, StopSignals


class Paused(Exception):
    """A pause of a run that has saved its state at a rung of successive halving.

    Args:
        rung: Requested share of all steps, step, planned steps, and name and value of the
            monitored metric there.
    """

    def __init__(self, rung: dict[str, Any]) -> None:
        super().__init__(f"paused at step {rung['step']} of {rung['planned']}")
        self.rung = rung


def _steps_between_validations(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps from one validation to the next."""
    count, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    between = float(trainer.val_check_batch or math.inf)
    if trainer.check_val_every_n_epoch is None:  # counted over all epochs
        return between / count
    if between < batches:
        return between / count
    return math.ceil(batches / count) * trainer.check_val_every_n_epoch


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which verifies each new file before it deletes an older one.

    In any Trainer, files are synced to disk before they get their names. The callback also finds
    them in its own folder after the run was moved.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        sync_checkpoints(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        live = trainer.lightning_module.state_dict()
        if not trainer.is_global_zero:
            return
        try:
            check_kept(live)
            check_written(Path(filepath), live)
        except UserError:
            Path(filepath).unlink(missing_ok=True)
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's record of the best checkpoints, whose files may be deleted later.

        Raises:
            UserError: If the record names a file that this callback does not write, or a score is
                not a number.
        """
        prefix = re.escape((self.filename or "").partition("{")[0])

        def here(path: Any, own: str = prefix) -> str:
            name = Path(path).name if isinstance(path, str) else repr(path)
            fits = re.fullmatch(rf"(?!\.){own}[^/\\\0]*\.ckpt", name)
            if path and (not fits or name == PREVIOUS or (own == prefix and name == LAST)):
                raise _forged(f"names {path!r} as one of the best checkpoints")
            return str(Path(str(self.dirpath)) / name) if path else ""

        best = state_dict.get("best_k_models") or {}
        if not isinstance(best, dict):
            raise _forged("has no list of the best checkpoints")
        scores = [*best.values(), *(state_dict.get(k) for k in ("best_model_score", "kth_value"))]
        if not all(score is None or isinstance(score, (int, float, Tensor)) for score in scores):
            raise _forged("holds a score that is no number")
        moved = dict(state_dict, dirpath=self.dirpath)
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = here(moved.get(key))
        if moved.get("last_model_path"):  # from save_last=true, not the file of LastCheckpoint
            moved["last_model_path"] = here(moved["last_model_path"], "last")
        moved["best_k_models"] = {here(path): score for path, score in best.items()}
        super().load_state_dict(moved)


def _forged(what: str) -> UserError:
    return UserError(
        f"the checkpoint {what}, which no run writes: it was changed, or is damaged. Its weights "
        "are a start for a new run: adapter=CHECKPOINT.ckpt."
    )


class SyncedCheckpointIO(TorchCheckpointIO):
    """A checkpoint writer that writes beside the final path, syncs, and then renames.

    Lightning's own writer uses the system's folder for temporary files, which may be small or on
    another disk. It syncs nothing.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        made_folder(Path(path).parent)
        with written_beside(Path(path)) as beside:
            _save_to(beside, checkpoint)


def sync_checkpoints(trainer: L.Trainer) -> None:
    """Make a trainer sync its checkpoints to disk, unless it has a custom checkpoint writer."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SyncedCheckpointIO()


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
        self.pause_at: tuple[float, str] | None = None
        """Share of all steps and a metric. The run pauses at the validation nearest to it."""
        self.rungs: list[float] = []
        """All rungs, this one and others, as shares of all steps."""
        self.signals: StopSignals | None = None
        """Signals that request the run to save and end."""
        self._shared = SharedNumber()
        self._is_time = False
        self._signum = 0
        self._rung: dict[str, Any] | None = None
        self._saved_at: int | None = None
        self._validated_at = 0
        self._saved_time = 0.0
        self._last_is_whole = True
        self._whole: tuple[int, int] | None = None
        """Lightning's counts at the end of a step while weights and optimizer match it."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="last.ckpt")
        self._written: Future[None] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = self._validated_at = trainer.global_step
        self._saved_time = time.monotonic()
        # When a run resumes from the previous file, the last one is damaged or missing.
        self._last_is_whole = Path(str(trainer.ckpt_path)).name != PREVIOUS
        if self.pause_at is None:
            return
        share, planned = self.pause_at[0], int(trainer.estimated_stepping_batches)
        if share * planned < 1:
            raise UserError(
                f"launcher.halving: a rung at {share:.3g} of {planned} optimizer steps is less "
                "than one step. Give fewer rungs, a smaller eta, or a larger min_resource."
            )
        interval = _steps_between_validations(trainer)
        at = [interval * max(1, math.ceil(rung * planned / interval - 0.5)) for rung in self.rungs]
        if len({*at, planned}) <= len(at) or (at and max(at) >= planned):
            raise UserError(
                f"launcher.halving: rungs at {', '.join(f'{rung:.3g}' for rung in self.rungs)} of "
                f"{planned} optimizer steps need a validation each, before the last step, and "
                f"there is one every {interval:g} steps. Validate more often, "
                "trainer.val_check_interval=0.5 or less, or give fewer rungs."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.pause_at is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        share, metric = self.pause_at
        planned = int(trainer.estimated_stepping_batches)
        interval = trainer.global_step - self._validated_at
        self._validated_at = trainer.global_step
        near = trainer.global_step >= share * planned - interval / 2
        if near and metric in trainer.callback_metrics:
            self._rung = {
                "share": share,
                "step": trainer.global_step,
                "planned": planned,
                "monitor": metric,
                "value": float(trainer.callback_metrics[metric]),
                "loss": float(trainer.callback_metrics.get("val/loss", math.inf)),
            }

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
        loop = trainer.fit_loop.epoch_loop
        steps = trainer.global_step - (self._saved_at or 0)
        due = self._is_time or (self.every_n_steps is not None and steps >= self.every_n_steps)
        if not _can_go_on_here(trainer):
            return
        if due or self._signum or self._rung is not None:
            self._save(trainer)
        self._whole = (i + 1, loop._batches_that_stepped)

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
            whole = self._whole or _at_the_end_of_a_step(trainer)
            if whole is not None:
                _back_to(trainer, *whole)
                self._save(trainer)
                self._wait()
                if isinstance(exception, Exception):  # otherwise the command reports how to resume
                    at = f"the state after step {trainer.global_step}"
                    say(f"saved {at}: {self.path}", file=sys.stderr)

    def _save(self, trainer: L.Trainer) -> None:
        self._wait()
        self._saved_at, self._saved_time, self._is_time = (
            trainer.global_step,
            time.monotonic(),
            False,
        )
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
            check_kept(content["state_dict"])
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


def _can_go_on_here(trainer: L.Trainer) -> bool:
    """Return whether a run can resume from the end of this batch, when its hooks are called.

    No gradient may be partly accumulated. Lightning does not make up for a validation or an
    epoch's end that is due here.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return not (
        loop._should_accumulate() or loop._is_training_done or loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]
    )


def _at_the_end_of_a_step(trainer: L.Trainer) -> tuple[int, int] | None:
    """Return Lightning's counts while it calls the hooks at the end of a step, otherwise None."""
    loop = trainer.fit_loop.epoch_loop
    count = loop.batch_progress.current
    is_there = trainer.training and count.processed == count.completed + 1  # type: ignore[attr-defined]
    if not is_there or not _can_go_on_here(trainer):
        return None
    return count.processed, loop._batches_that_stepped  # type: ignore[attr-defined]


def _back_to(trainer: L.Trainer, batches: int, stepped: int) -> None:
    """Reset Lightning's counts to the end of a step, after which no other step was taken.

    Args:
        trainer: Trainer that is in training, after that step.
        batches: Number of batches of this epoch up to the step.
        stepped: Lightning's count of steps for its loggers.
    """
    loop = trainer.fit_loop.epoch_loop
    progress, optimizer = loop.batch_progress, loop.automatic_optimization.optim_progress.optimizer
    since = progress.current.completed - batches
    for count in (progress.current, progress.total):
        count.ready = count.started = count.processed = count.completed - since  # type: ignore[attr-defined]
        count.completed = count.ready - 1
    for steps, cleared in (
        (optimizer.step.current, optimizer.zero_grad.current),
        (optimizer.step.total, optimizer.zero_grad.total),
    ):
        steps.ready = cleared.ready = cleared.started = cleared.completed = steps.completed  # type: ignore[attr-defined]
    # The flag belongs to an unfinished batch and would make Lightning treat the epoch as ended.
    progress.is_last_batch = False
    loop._batches_that_stepped = stepped
    for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
        if hasattr(loader, "given"):  # the loader can resume in mid-epoch
            loader.given = batches


def _save_to(path: Path, content: Any) -> None:
    """Save to memory, then to the file, because torch.save hides why a file cannot be written.

    Raises:
        OSError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


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
        made_folder(path.parent)
        with written_beside(path) as beside:
            _save_to(beside, dict(content))
            check_written(beside, content["state_dict"])
            if keep and path.exists():
                sync(beside)  # this may fail, so it precedes any change to the older files
                os.replace(path, path.with_name(PREVIOUS))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. The checkpoint before it is whole: free some space and "
            "continue with resume=."
        ) from None
