"""Messages between the processes of a run: a number at each step, and a signal at any time."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor


class SharedNumber:
    """A number that all processes exchange at each step or batch, where the highest counts.

    They read it one step later, so that the host never waits for a device that is still busy.
    """

    def __init__(self) -> None:
        self._sent: Tensor | None = None
        self._arrives: torch.cuda.Event | None = None

    def exchange(self, trainer: L.Trainer, number: int) -> int:
        """Send a number, and return the highest number of the previous step (initially 0).

        A single process gets its own number at once. All processes must call this at every step.
        """
        if trainer.world_size == 1:
            return number
        previous = self._read()
        sent = torch.full((), number, device=trainer.strategy.root_device)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        if sent.is_cuda:
            host = torch.empty((), dtype=sent.dtype, pin_memory=True)
            sent = host.copy_(sent, non_blocking=True)
            self._arrives = torch.cuda.Event()
            self._arrives.record()
        self._sent = sent
        return previous

    def highest(self, trainer: L.Trainer, number: int) -> int:
        """Return the highest number of all processes now, which waits for the device."""
        own = self.exchange(trainer, number)
        return own if trainer.world_size == 1 else self._read()

    def _read(self) -> int:
        if self._sent is None:
            return 0
        if self._arrives is not None:
            self._arrives.synchronize()
        return int(self._sent)


def announce(key: str, signum: int) -> None:
    """Announce a signal to all processes through their rendezvous store, so that none waits."""
    with suppress(Exception):  # the store may be gone with its process
        if dist.is_available() and dist.is_initialized():
            store().set(key, str(signum))


def announced(key: str) -> int:
    """Return the signal that another process has announced, or 0."""
    with suppress(Exception):
        if dist.is_available() and dist.is_initialized() and store().check([key]):
            return int(store().get(key))
    return 0


def store() -> Any:
    """Return the key-value store that the processes have met through."""
    return dist.distributed_c10d._get_default_store()  # torch 2.13 has no public access to it
