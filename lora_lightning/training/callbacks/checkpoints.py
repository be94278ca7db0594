"""Checkpoints: the best, and the last, that a killed, stopped or paused run goes on from."""

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
    """A run has saved its state at a rung of successive halving and goes no further now.

    Args:
        rung: share of all steps that was asked for, step, planned steps, and name and value of the
            monitored metric there.
    """

    def __init__(self, rung: dict[str, Any]) -> None:
        super().__init__(f"paused at step {rung['step']} of {rung['planned']}")
        self.rung = rung


def _steps_between_validations(trainer: L.Trainer) -> float:
    """Optimizer steps from one validation to the next."""
    count, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    between = float(trainer.val_check_batch or math.inf)
    if trainer.check_val_every_n_epoch is None:  # counted over all epochs
        return between / count
    if between < batches:
        return between / count
    return math.ceil(batches / count) * trainer.check_val_every_n_epoch


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, which reads again what it has written, before an older one makes way for it.

    Its files are on the disk before they are named, in any Trainer. It finds them in its own folder
    too where the run has been moved.
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
        """Takes over what a checkpoint says of the best ones, whose files may be deleted later.

        Raises:
            UserError: it names a file that this callback does not write, or a score is no number.
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
        if moved.get("last_model_path"):  # with save_last=true; LastCheckpoint's is another file
            moved["last_model_path"] = here(moved["last_model_path"], "last")
        moved["best_k_models"] = {here(path): score for path, score in best.items()}
        super().load_state_dict(moved)


def _forged(what: str) -> UserError:
    return UserError(
        f"the checkpoint {what}, which no run writes: it was changed, or is damaged. Its weights "
        "are a start for a new run: adapter=CHECKPOINT.ckpt."
    )


class SyncedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and names it when it is on the disk.

    Lightning's goes through the system's folder for temporary files, which may be small or on
    another disk, and syncs nothing.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        made_folder(Path(path).parent)
        with written_beside(Path(path)) as beside:
            _save_to(beside, checkpoint)


def sync_checkpoints(trainer: L.Trainer) -> None:
    """Has a trainer write its checkpoints synced, unless it has a way of its own to write them."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SyncedCheckpointIO()


class _Caught(TorchCheckpointIO):
    """Keeps the content of a checkpoint that a Trainer saves, and writes no file."""

    content: Any = None

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.content = checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a killed run resumes exactly, and the one before it.

    It is saved every few minutes or optimizer steps and after every epoch, at points where no
    gradient is half accumulated and no other callback has yet to see a validation. Rank 0 copies
    the state to the host's memory; a thread writes it, reads it again and compares, while training
    continues. Writing is atomic: a kill in mid-write leaves the previous file.

    A run of one process that an exception or Ctrl-C ends in training is saved too, as it was after
    its last whole step. Several processes are not: the others may wait for the one that failed.

    Args:
        folder: where last.ckpt goes.
        every_n_minutes: minutes between two saves; None: time does not count.
        every_n_steps: optimizer steps between two saves; None: steps do not count.
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
        """Share of all steps, and a metric: at the validation nearest to it, the run pauses."""
        self.rungs: list[float] = []
        """Shares of all steps of all rungs, this one and others."""
        self.signals: StopSignals | None = None
        """Tells when the run is to save and end."""
        self._shared = SharedNumber()
        self._is_time = False
        self._signum = 0
        self._rung: dict[str, Any] | None = None
        self._saved_at: int | None = None
        self._validated_at = 0
        self._saved_time = 0.0
        self._last_is_whole = True
        self._whole: tuple[int, int] | None = None
        """Where weights and optimizer are as after a whole step: Lightning's counts at its end."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="last.ckpt")
        self._written: Future[None] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = self._validated_at = trainer.global_step
        self._saved_time = time.monotonic()
        # Where a run resumes from the one before it, the last is damaged, or was never there.
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
        # Under max_steps Lightning would run an epoch's end a second time, and it does not store
        # that a run was told to stop: there the checkpoint in mid-epoch has to do.
        if trainer.max_steps == -1 and not trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ended = 0 <= trainer.max_steps <= trainer.global_step  # it may be amid an epoch
        if ended and trainer.global_step > (self._saved_at or 0) and self._rung is None:
            self._save(trainer)
        self._wait()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        with suppress(UserError):  # what has happened before is what the user has to hear of
            self._wait()
            begun = self._saved_at is not None  # else a state is half restored
            if trainer.world_size > 1 or not begun or trainer.global_step == self._saved_at:
                return
            whole = self._whole or _at_the_end_of_a_step(trainer)
            if whole is not None:
                _back_to(trainer, *whole)
                self._save(trainer)
                self._wait()
                if isinstance(exception, Exception):  # else the command tells how to go on
                    at = f"the state after step {trainer.global_step}"
                    say(f"saved {at}: {self.path}", file=sys.stderr)

    def _save(self, trainer: L.Trainer) -> None:
        self._wait()
        self._saved_at, self._saved_time, self._is_time = (
            trainer.global_step,
            time.monotonic(),
            False,
        )
        for logger in trainer.loggers:  # what the checkpoint knows of will not be logged again
            logger.save()
        usual, caught = trainer.strategy.checkpoint_io, _Caught()
        trainer.strategy.checkpoint_io = caught
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            trainer.strategy.checkpoint_io = usual
        if caught.content is not None:  # in rank 0
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
        """Waits until what was saved is on the disk.

        Raises:
            UserError: it could not be written, or reads otherwise.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()


def _can_go_on_here(trainer: L.Trainer) -> bool:
    """Whether a run can go on from the end of this batch, when its hooks are called.

    No gradient may be half accumulated, and Lightning does not make up for a validation or an
    epoch's end that was due here.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return not (
        loop._should_accumulate() or loop._is_training_done or loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]
    )


def _at_the_end_of_a_step(trainer: L.Trainer) -> tuple[int, int] | None:
    """Lightning's counts where it is calling the hooks at a step's end; None elsewhere."""
    loop = trainer.fit_loop.epoch_loop
    count = loop.batch_progress.current
    is_there = trainer.training and count.processed == count.completed + 1  # type: ignore[attr-defined]
    if not is_there or not _can_go_on_here(trainer):
        return None
    return count.processed, loop._batches_that_stepped  # type: ignore[attr-defined]


def _back_to(trainer: L.Trainer, batches: int, stepped: int) -> None:
    """Sets Lightning's counts back to the end of a step. No later one may have been taken.

    Args:
        trainer: in training, after that step.
        batches: of this epoch, up to the step.
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
    # That of a batch that is not done: Lightning would take the epoch for one that has ended.
    progress.is_last_batch = False
    loop._batches_that_stepped = stepped
    for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
        if hasattr(loader, "given"):  # one that can go on in mid-epoch
            loader.given = batches


def _save_to(path: Path, content: Any) -> None:
    """torch.save by way of memory: by itself it does not tell why a file cannot be written.

    Raises:
        OSError: it cannot.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def _copied(content: Any) -> Any:
    """A checkpoint's content in memory of its own, on the CPU."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        return copy.deepcopy(value)

    return tree_map(copied, content)


def _write(path: Path, content: Mapping[str, Any], *, keep: bool) -> None:
    """Writes a checkpoint beside its place, reads it again, and puts it there.

    Args:
        path: its place.
        content: the checkpoint.
        keep: whether the one that is there is kept too: a disk may lose what it had written.
    """
    try:
        made_folder(path.parent)
        with written_beside(path) as beside:
            _save_to(beside, dict(content))
            check_written(beside, content["state_dict"])
            if keep and path.exists():
                sync(beside)  # what may fail comes before the older ones are touched
                os.replace(path, path.with_name(PREVIOUS))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. The checkpoint before it is whole: free some space and "
            "continue with resume=."
        ) from None
