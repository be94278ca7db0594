"""Periodic status lines for a run whose output goes to a file."""

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
    """A thread that reports what a run is doing after a while without output.

    A file shows no progress bar. Without these lines, model loading and text generation would look
    like a hang.

    Args:
        wanted: Whether to report at all. A terminal has the bar, so nothing is reported there.
    """

    EVERY = 25.0
    """Seconds without output before a line is written."""
    said = 0.0
    """Time of the last line, from here or from the bar, on the clock `time.monotonic`."""

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
        """Return what the run is doing now."""
        with suppress(Exception):  # the run changes the trainer concurrently
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
    if not batches:  # no data loader exists yet
        return PREPARING
    total, done = sum(batches), loop.batch_progress.current.completed
    texts = ", now generating texts or measuring" if done == total else ""
    return f"{what}: {done} of {total:.0f} batches{texts}"
