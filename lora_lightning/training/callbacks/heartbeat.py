"""Signs of life of a run whose output goes to a file."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any

import lightning as L

from lora_lightning.utils.terminal import say

PREPARING = "preparing the model and the data"


class Heartbeat:
    """Says what a run is doing where it has said nothing for a while.

    A progress bar is not shown in a file; a model that loads, and texts that are generated, would
    look like a run that hangs.

    Args:
        wanted: whether to say anything; a terminal has the bar.
    """

    EVERY = 25.0
    """Seconds."""
    said = 0.0
    """When the last line was written, here or by the bar, by the clock `time.monotonic`."""

    def __init__(self, *, wanted: bool) -> None:
        self.wanted = wanted and not sys.stdout.isatty()
        self.trainer: L.Trainer | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Heartbeat:
        if self.wanted:
            Heartbeat.said = time.monotonic()
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        while not self._ended.wait(min(1.0, self.EVERY)):
            if time.monotonic() - Heartbeat.said >= self.EVERY:
                Heartbeat.said = time.monotonic()
                say(self.line())

    def line(self) -> str:
        """What the run is doing now."""
        with suppress(Exception):  # the run changes it meanwhile
            if self.trainer is not None and self.trainer.state.stage is not None:
                return _doing(self.trainer)
        return PREPARING


def _doing(trainer: L.Trainer) -> str:
    if trainer.training:
        return f"training: epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
    loop: Any
    if trainer.testing:
        what, loop, batches = "test", trainer.test_loop, trainer.num_test_batches
    else:
        fits = trainer.state.fn == "fit"
        loop = trainer.fit_loop.epoch_loop.val_loop if fits else trainer.validate_loop
        what, batches = "validation", trainer.num_val_batches
    if not batches:  # no loader has been made yet
        return PREPARING
    total, done = sum(batches), loop.batch_progress.current.completed
    texts = ", now generating texts or measuring" if done == total else ""
    return f"{what}: {done} of {total:.0f} batches{texts}"
