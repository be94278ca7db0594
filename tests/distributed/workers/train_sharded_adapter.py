"""What each process holds of an adapter and of its optimizer: python -m torch.distributed.run.

    train_sharded_adapter.py SETTING ...

Trains as the settings say, and prints by rank, as JSON, the shapes of each trained parameter and of
the matrices that the optimizer keeps for it, and the shapes of what rank 0 sums with others in the
first batch; then writes the weights of a checkpoint to `output_dir`/weights.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.distributed.environment import leave
from lora_lightning.tasks import build_task
from lora_lightning.training.components import build_components
from lora_lightning.training.trainer import build_trainer


class Sums(TorchDispatchMode):
    """Notes the shapes of tensors that are summed over processes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith(("allreduce_", "all_reduce")):
            tensors = [one for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
            self.shapes.append(list(tensors[0].shape))
        return func(*args, **(kwargs or {}))


class Held(Callback):
    """Prints shapes at the end of training."""

    def __init__(self) -> None:
        self.sums = Sums()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.sums.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self.sums.__exit__(None, None, None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        held = {
            name: [list(parameter.shape)]
            + [list(v.shape) for v in optimizer.state[parameter].values() if v.dim() > 0]
            for name, parameter in pl_module.named_parameters()
            if parameter.requires_grad
        }
        by_rank: list[Any] = [held]
        if trainer.world_size > 1:
            by_rank = [None] * trainer.world_size
            dist.all_gather_object(by_rank, held)
        if trainer.is_global_zero:
            print("HELD", json.dumps([by_rank, self.sums.shapes]))


def main(settings: list[str]) -> None:
    config = compose_config(settings)
    folder = Path(config.output_dir)
    L.seed_everything(config.seed, verbose=False)
    full = settings_of(config)
    task = build_task(full.task)
    module, data = build_components(full, task, seed=config.seed, start_from=config.adapter)
    trainer = build_trainer(config, callbacks=[Held()], logger=False)
    trainer.fit(module, data)
    weights = module.state_dict()
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights, folder / "weights.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
