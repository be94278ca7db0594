"""What a run costs: seconds, tokens, memory, and how many tokens a second."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ..strategies import data_ranks


class RunClock(Callback):
    """Measures a run: seconds of training, tokens trained on, peak memory.

    `tokens` counts positions that the attention mask admits, without padding, over all ranks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._counted = torch.zeros((), dtype=torch.long)  # on this rank, not yet in `tokens`
        self._trainer: L.Trainer | None = None
        self._started: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        self._counted = self._counted.to(pl_module.device)
        self._trainer = trainer
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._counted += _batch_counts(batch)[1]  # on the device: nothing waits for it

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._started is None:
            return
        self.seconds += time.monotonic() - self._started
        self._started = None
        self.tokens += self._over_ranks(trainer)
        self._counted = torch.zeros_like(self._counted)
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        # Lightning asks all ranks, and stores what rank 0 says.
        counted = 0 if self._trainer is None else self._over_ranks(self._trainer)
        return {"seconds": self.seconds + running, "tokens": self.tokens + counted}

    def _over_ranks(self, trainer: L.Trainer) -> int:
        """Tokens not yet in `tokens`; every rank has to ask."""
        counted = int(trainer.strategy.reduce(self._counted.clone(), reduce_op="sum"))  # in place
        return counted * data_ranks(trainer) // trainer.world_size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]


class Throughput(Callback):
    """Logs rows and tokens (without padding) trained on per second, over all ranks.

    What is counted stays on the device between two loggings, every `log_every_n_steps` of the
    Trainer and at the end. The time of validations is left out.
    """

    def __init__(self) -> None:
        self._counted = torch.zeros(2, dtype=torch.long)
        self._since = self._stopped = 0.0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counted = torch.zeros(2, dtype=torch.long, device=pl_module.device)
        self._since, self._step = time.monotonic(), trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stopped = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.monotonic() - self._stopped

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._counted += _batch_counts(batch)
        if trainer.global_step - self._step >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._log(trainer)
            self._begin(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._step:
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        rows, tokens = (self._counted * data_ranks(trainer)).tolist()  # waits for the device
        seconds = time.monotonic() - self._since
        rates = {
            "throughput/rows_per_second": rows / seconds,
            "throughput/tokens_per_second": tokens / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=trainer.global_step)


def _batch_counts(batch: dict[str, Any] | list[dict[str, Any]]) -> Tensor:
    """Rows of a batch and its tokens without padding, (2), on the batch's device."""
    if isinstance(batch, list):
        return torch.stack([_batch_counts(part) for part in batch]).sum(0)
    if "filled" in batch:  # packed: a row begins at each position 0
        filled = batch["filled"] == 1
        return torch.stack([((batch["position_ids"] == 0) & filled).sum(), filled.sum()])
    shown = batch["attention_mask"] == 1
    return torch.stack([shown.any(1).sum(), shown.sum()])
