"""How much memory training takes, by part, before it is begun."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import Settings
from .data.datamodule import LoraDataModule
from .module import LoraModule

PROBE_ROWS = 4
STATES = {"SGD": 1, "AdamW": 2, "Adam": 2}
"""Numbers that an optimizer keeps for each that it trains."""


class Memory:
    """Bytes of a run, or of several that share their frozen weights.

    Activations are what autograd keeps for a few of the longest rows, scaled to the rows that are
    computed at a time.

    Args:
        module: with its model.
        data: set up.
        settings: the run's.
        device: where it is to train.
    """

    def __init__(
        self, module: LoraModule, data: LoraDataModule, settings: Settings, device: torch.device
    ) -> None:
        assert module.model is not None
        tensors = list(module.model.parameters())
        self.frozen = sum(p.numel() * p.element_size() for p in tensors if not p.requires_grad)
        self.trained = sum(p.numel() * p.element_size() for p in tensors if p.requires_grad)
        self.states = STATES.get(settings.optim.name, 2)
        batch = {k: v.to(device) for k, v in data.longest_batch("train", PROBE_ROWS).items()}
        probed, width = batch["input_ids"].shape
        self.of_a_row = saved_bytes(module, batch) / probed
        self.batch_size = settings.data.batch_size
        limit = data.tokens_on(device.type)
        self.at_a_time = None if limit is None else max(1, limit // width)

    def parts(self, runs: int = 1) -> dict[str, int]:
        """Bytes by part, of as many runs like this one."""
        trained = runs * self.trained
        rows = runs * self.batch_size
        if self.at_a_time is not None:
            rows = min(rows, self.at_a_time)
        return {
            "weights": self.frozen + trained,
            "gradients": trained,
            "optimizer": self.states * trained,
            "activations": int(self.of_a_row * rows),
        }


def saved_bytes(module: LoraModule, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd holds between forward and backward, parameters not counted."""
    assert module.model is not None
    own = {p.untyped_storage().data_ptr() for p in module.model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # held, so that no address is used twice
        return tensor

    module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.task.loss(module.model, batch)
    return sum(sizes.values())
