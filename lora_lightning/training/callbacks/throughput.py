"""Callbacks that measure seconds, tokens, memory and throughput of a run."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lora_lightning.distributed.strategies import data_ranks
from lora_lightning.lora import UserError
from lora_lightning.training.checkpoint_validation import is_number
from lora_lightning.training.lightning_internals import is_accumulating

from .loggers import log_after


class RunClock(Callback):
    """A callback that measures seconds of training, tokens trained on, and peak memory.

    `tokens` counts tokens without padding, over all ranks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._counted = 0  # on this rank, not yet in `tokens`
        self._begun = 0  # tokens of a step that is not yet taken
        self._trainer: L.Trainer | None = None
        self._started: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        self._trainer = trainer
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._begun += _batch_counts(batch)[1]
        if not is_accumulating(trainer):
            self._counted, self._begun = self._counted + self._begun, 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._started is None:
            return
        _wait_for(trainer.strategy.root_device)
        self.seconds += time.monotonic() - self._started
        self._started = None
        self.tokens += self._over_ranks(trainer)
        self._counted = 0
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        # Lightning calls this on all ranks, and stores the result of rank 0.
        counted = 0 if self._trainer is None else self._over_ranks(self._trainer)
        return {"seconds": self.seconds + running, "tokens": self.tokens + counted}

    def _over_ranks(self, trainer: L.Trainer) -> int:
        """Return the number of tokens not yet in `tokens`. All ranks must call this."""
        if trainer.world_size == 1:
            return self._counted
        counted = torch.tensor(self._counted, device=trainer.strategy.root_device)
        counted = trainer.strategy.reduce(counted, reduce_op="sum")
        return int(counted) * data_ranks(trainer) // trainer.world_size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the seconds and tokens from a checkpoint.

        Raises:
            UserError: If they are not valid numbers of seconds and of tokens.
        """
        seconds, tokens = state_dict["seconds"], state_dict["tokens"]
        if not (is_number(seconds) and is_number(tokens, whole=True) and min(seconds, tokens) >= 0):
            raise UserError(f"the checkpoint tells of {seconds!r} seconds and {tokens!r} tokens.")
        self.seconds, self.tokens = float(seconds), int(tokens)


class Throughput(Callback):
    """A callback that logs rows and tokens (without padding) trained on per second on all ranks.

    It logs every `log_every_n_steps` of the Trainer, and at the end. Only these moments wait for
    the device. 0 disables logging. The time of validations is left out.
    """

    def __init__(self) -> None:
        self._rows = self._tokens = 0
        self._since = self._stopped = 0.0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        self._rows = self._tokens = 0
        self._since, self._step = time.monotonic(), trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stopped = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.monotonic() - self._stopped

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        rows, tokens = _batch_counts(batch)
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step - self._step >= every:
            self._log(trainer)
            self._begin(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.log_every_n_steps and trainer.global_step > self._step:  # type: ignore[attr-defined]
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        _wait_for(trainer.strategy.root_device)
        seconds = time.monotonic() - self._since
        ranks = data_ranks(trainer)
        rates = {
            "throughput/rows_per_second": self._rows * ranks / seconds,
            "throughput/tokens_per_second": self._tokens * ranks / seconds,
        }
        log_after(trainer, rates, trainer.global_step)


def _batch_counts(batch: dict[str, Any] | list[dict[str, Any]]) -> tuple[int, int]:
    """Return the rows of a batch and its tokens without padding, as counted by `Task.locate`."""
    parts = batch if isinstance(batch, list) else [batch]
    return sum(part["rows"] for part in parts), sum(part["tokens"] for part in parts)


def _wait_for(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
