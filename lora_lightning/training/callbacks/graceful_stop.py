"""Handling of signals that end a run (SIGTERM, SLURM's time warning, a closed terminal)."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lora_lightning.distributed.parallel_dims import ParallelDims
from lora_lightning.training.lightning_internals import skip_sigterm_broadcast

from .rank_messages import SharedNumber, announce, announced, store

UNHEARD = 30.0
"""Seconds after which a signal ends a process that is waiting for others outside of Python."""
AHEAD = 3
"""Tokens after which the processes of a tensor-parallel group stop together. At the check of a
token, a process knows that the whole group has begun the previous token. Two tokens would suffice,
but a GPU's host may be one token ahead."""
ASKED = 0.5
"""Seconds between two checks for a signal to another process."""
_NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP")  # not all are on Windows
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Stopped(BaseException):
    """The end of a run on request, which in training comes after the run has saved its state.

    Like KeyboardInterrupt, it can come anywhere. It is not an Exception, so code that reads files
    cannot take it for an error in them.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Ended(KeyboardInterrupt):
    """The end on request of a command that has no step to save at.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Make the signals that end a process raise Ended in the block, so that it can clean up."""

    def end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    in_main = threading.current_thread() is threading.main_thread()  # only it can set handlers
    before = {number: signal.signal(number, end) for number in heard() if in_main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard() -> tuple[signal.Signals, ...]:
    """Return the members of SIGNALS that nohup or a shell has not turned off."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN)


class StopSignals(Callback):
    """A callback that records signals to end a run, and makes all its processes end at one step.

    In training, the callback that keeps `last.ckpt` sends the received signal to all processes,
    and saves before it ends the run. A test or a validation ends at once, because its results
    would be measured again. So do phases before and between these, such as model loading, where no
    other process waits. In text generation, each process has its own pace. There, a process that
    gets a signal announces it to the others, which check for it now and then.

    Lightning's own SIGTERM handler is replaced. Its processes communicate within it, and at every
    step it waits for a GPU.
    """

    _runs = 0
    """Number of runs of this process so far, which is the same in all processes of a run."""

    def __init__(self) -> None:
        StopSignals._runs += 1
        self._word = f"lora_lightning/stopped/{StopSignals._runs}"
        self._asked = -math.inf
        self._tokens = 0
        self.received = 0
        self.saves = False
        """Whether another callback sends the received signal, and saves before it ends the run."""
        self.has_trained = False
        """Whether the first step has begun in this process."""
        self._shared = SharedNumber()
        self._has_steps = False
        """Whether Lightning is processing batches, at which signals are checked."""
        self._measures = False
        """Whether the batches belong to a validation or a test, whose results are repeatable."""
        self._before: dict[int, Any] = {}
        self._heard = -math.inf
        """Time at which Python last handled a signal."""

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
        """End this process on a signal that Python does not get to handle.

        Python handles signals only between two of its own steps. None occurs while the process
        waits in a library for others to join, which may take half an hour.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def watch() -> None:
            while number := os.read(reader, 1):
                came = time.monotonic()
                if number[0] not in self._before:
                    continue
                announce(self._word, number[0])
                while self._heard < came - 1.0:  # Python may have handled it first
                    if time.monotonic() - came > UNHEARD:
                        name = signal.Signals(number[0]).name
                        print(f"{name}: ended while waiting for other processes", file=sys.stderr)
                        os._exit(128 + number[0])
                    time.sleep(0.1)
            os.close(reader)

        threading.Thread(target=watch, daemon=True).start()

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # a run of a pack, whose process gets signals for all its runs
        for number in heard():
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt) and interrupt != self._interrupt:
            self._before.setdefault(signal.SIGINT, interrupt)
            signal.signal(signal.SIGINT, self._interrupt)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._heard = time.monotonic()
        self.received = self.received or number
        alone = not (dist.is_available() and dist.is_initialized())
        if alone and (self._measures or not self._has_steps):
            raise Stopped(self.received)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._heard = time.monotonic()
        self._before[signal.SIGINT](number, frame)

    def is_requested(self) -> bool:
        """Return whether this process got a signal, or another process has announced one.

        No process waits for another here, so they need not call this at the same time.
        """
        if not self.received and time.monotonic() - self._asked > ASKED:
            self._asked = time.monotonic()
            self.received = announced(self._word)
        return bool(self.received)

    def is_requested_together(self, group: int) -> bool:
        """Return `is_requested`, with the same answer at the same call in all processes of a group.

        They compute each token together. The first that gets a signal therefore names a call that
        none of them has reached.

        Args:
            group: Number of the group.
        """
        self._tokens += 1
        key = f"{self._word}/{group}"
        if self.is_requested():
            stop = store().compare_set(key, "", str(self._tokens + AHEAD))
        elif store().check([key]):
            stop = store().get(key)
        else:
            return False
        return self._tokens >= int(stop)

    def check_for(self, shards: ParallelDims | None) -> Callable[[], bool]:
        """Return the check to call amid text generation, for processes that share a base.

        Tensor-parallel processes, which cut each matrix, must generate the same tokens.
        """
        if shards is not None and shards.tensor > 1:
            return partial(self.is_requested_together, shards.data_rank)
        return self.is_requested

    def raise_if_requested(self, trainer: L.Trainer) -> None:
        """Raise Stopped if any process got a signal. All processes must call this."""
        if signum := self._shared.highest(trainer, self.received):
            raise Stopped(signum)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._install()
        if hasattr(pl_module, "stop_signals"):
            pl_module.stop_signals = self  # type: ignore[assignment]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()
        self._has_steps = True
        skip_sigterm_broadcast(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        self.has_trained = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if not self.saves:
            self._raise_on_all_ranks(trainer)

    def _raise_on_all_ranks(self, trainer: L.Trainer) -> None:
        """Raise Stopped in all processes, which are at the same batch, if any got a signal."""
        if signum := self._shared.exchange(trainer, self.received):
            raise Stopped(signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_steps = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()
        self._has_steps = self._measures = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_steps, self._measures = trainer.state.fn == "fit", False

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()
        self._has_steps = self._measures = True

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_steps = self._measures = False

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._raise_on_all_ranks(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        self._raise_on_all_ranks(trainer)
