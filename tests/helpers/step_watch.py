"""Callbacks that watch what a process does around and within its steps."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import torch.distributed as dist
from transformers.distributed import utils


class NoBarrier(L.Callback):
    """Fails where a training step sets a barrier; counts the collectives of each step."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.counts: list[int] = []
        self._own = dist.barrier, dist.all_reduce

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        def barrier(*args, **kwargs):
            raise AssertionError("a barrier within a training step")

        def all_reduce(*args, **kwargs):
            self.counts[-1] += 1
            return self._own[1](*args, **kwargs)

        self.counts.append(0)
        dist.barrier, dist.all_reduce = barrier, all_reduce

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        dist.barrier, dist.all_reduce = self._own

    def on_train_end(self, trainer, pl_module) -> None:
        path = self.folder / f"collectives-{trainer.global_rank}"
        path.write_text(" ".join(map(str, self.counts)))


class BoundDevices(L.Callback):
    """Notes for which local rank transformers takes a device while it shards the base."""

    def __init__(self, folder: str) -> None:
        own = utils._bind_local_device

        def bound(device_type: str, local_rank: int):
            Path(folder, f"bound-{os.environ['SLURM_PROCID']}").write_text(str(local_rank))
            return own(device_type, local_rank)

        utils._bind_local_device = bound


class Generates(L.Callback):
    """Leaves a file where a process begins to generate texts."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer, pl_module, stage) -> None:
        generate = type(pl_module.task).generate

        def noted(*args, **changes):
            (self.folder / f"generates-{trainer.global_rank}").touch()
            return generate(pl_module.task, *args, **changes)

        pl_module.task.generate = noted
