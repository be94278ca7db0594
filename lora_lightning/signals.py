"""A run that is told to end: by SIGTERM, or by SIGUSR1, SLURM's warning of its time limit."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

UNHEARD = 30.0
"""Seconds after which a signal ends a process that is waiting for others outside of Python."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)


class Stopped(Exception):
    """A run has ended where it was told to; in training, after it has saved its state.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals(Callback):
    """Notes the signals that tell a run to end, and sees that all its processes end at one step.

    In training the callback that keeps `last.ckpt` asks `agreed` at every step where it could
    save. A test or a validation ends at once: what it has measured would be measured again.

    Lightning's own handler of SIGTERM is replaced: its processes talk to each other within it, and
    at every step it has a GPU waited for.
    """

    def __init__(self) -> None:
        self.received = 0
        self.saves = False
        """Whether another callback asks `agreed`, and saves before it ends the run."""
        self._group: Any = None
        self._before: dict[int, Any] = {}
        self._heard = -math.inf
        """When Python last came to handle a signal."""

    def __enter__(self) -> StopSignals:
        self._install()
        if threading.current_thread() is threading.main_thread():
            self._end_if_unheard()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(signal.set_wakeup_fd(-1))

    def _end_if_unheard(self) -> None:
        """Ends this process by a signal that Python does not get to handle.

        It does so between two steps of its own, and there is none while the process waits in a
        library for others to join, which may be half an hour.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def watch() -> None:
            while number := os.read(reader, 1):
                came = time.monotonic()
                if number[0] not in self._before:
                    continue
                while self._heard < came - 1.0:  # Python may have been first
                    if time.monotonic() - came > UNHEARD:
                        name = signal.Signals(number[0]).name
                        print(f"{name}: ended while waiting for other processes", file=sys.stderr)
                        os._exit(128 + number[0])
                    time.sleep(0.1)
            os.close(reader)

        threading.Thread(target=watch, daemon=True).start()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a run of a pack, whose process is told for all of them
        for number in SIGNALS:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt) and interrupt != self._interrupt:
            self._before.setdefault(signal.SIGINT, interrupt)
            signal.signal(signal.SIGINT, self._interrupt)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._heard = time.monotonic()
        self.received = self.received or number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._heard = time.monotonic()
        self._before[signal.SIGINT](number, frame)

    def raise_if_told(self) -> None:
        """Raises Stopped if a signal has come to this process."""
        if self.received:
            raise Stopped(self.received)

    def agreed(self) -> int:
        """The signal that has come to any of the run's processes; all of them have to ask."""
        if self._group is None:
            return self.received
        number = torch.tensor(self.received)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return int(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # of CPU tensors: no GPU is waited for

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if not self.saves and (told := self.agreed()):
            raise Stopped(told)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.raise_if_told()

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        self.raise_if_told()
