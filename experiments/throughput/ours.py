"""The clock as a Lightning callback, which the config of a run names."""

from __future__ import annotations

from typing import Any

import lightning as L
from clock import Clock


class LightningClock(L.Callback):
    """Times the steps of `lora-lightning train +callbacks.bench._target_=ours.LightningClock`."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.steps = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return  # amid an accumulation
        self.steps = trainer.global_step
        self.clock.step()
        self.clock.loss(float(trainer.callback_metrics["train/loss"]))
