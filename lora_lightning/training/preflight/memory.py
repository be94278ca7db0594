"""Memory estimates by part before training starts, and advice for out-of-memory errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lora_lightning.config.groups import Settings
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.errors import UserError, causes, lack_of_memory
from lora_lightning.tasks import to_device
from lora_lightning.training.callbacks.graceful_stop import Stopped
from lora_lightning.training.module import LoraModule

PROBE_ROWS = 4
STATES = {"SGD": 1, "AdamW": 2, "Adam": 2}
"""Values that an optimizer keeps per trainable parameter value."""


class Memory:
    """Memory of one run, or of several runs that share their frozen base.

    Activations are the tensors that autograd keeps for a few of the longest rows. They are scaled
    to the number of rows that are computed at a time.

    Args:
        module: Module whose model is already built.
        data: Data module that is already set up.
        settings: Settings of the run.
        device: Device that the run would train on.
    """

    def __init__(
        self, module: LoraModule, data: LoraDataModule, settings: Settings, device: torch.device
    ) -> None:
        tensors = list(module.model.parameters())
        self.frozen = sum(p.numel() * p.element_size() for p in tensors if not p.requires_grad)
        self.trainable = sum(p.numel() * p.element_size() for p in tensors if p.requires_grad)
        self.states = STATES.get(settings.optim.name, 2)
        batch = to_device(data.longest_batch("train", PROBE_ROWS), device)
        probed, width = batch["input_ids"].shape
        self.of_a_row = saved_bytes(module, batch) / probed
        self.batch_size = settings.data.batch_size
        limit = data.tokens_on(device.type)
        self.at_a_time = None if limit is None else max(1, limit // width)

    def parts(self, runs: int = 1) -> dict[str, int]:
        """Return the bytes by part of `runs` runs like this one."""
        trainable = runs * self.trainable
        rows = runs * self.batch_size
        if self.at_a_time is not None:
            rows = min(rows, self.at_a_time)
        return {
            "weights": self.frozen + trainable,
            "gradients": trainable,
            "optimizer": self.states * trainable,
            "activations": int(self.of_a_row * rows),
        }


def saved_bytes(module: LoraModule, batch: dict[str, Any]) -> int:
    """Return the bytes that autograd holds between forward and backward, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # keeps its address from being reused
        return tensor

    module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.task.loss(module.model, batch)
    return sum(sizes.values())


@contextmanager
def memory_advice(config: DictConfig) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that lists the settings that help.

    Raises:
        UserError: If memory runs out.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:  # Rust libraries panic with a non-Exception
        if (reason := lack_of_memory(error)) is None:
            raise
        cpu = not any(isinstance(each, torch.OutOfMemoryError) for each in causes(error))
        helps = {
            "data.max_tokens=512 (fewer tokens at a time)": True,
            "data.batch_size (fewer rows at a time)": config.data.max_tokens is None,
            "model.gradient_checkpointing=true": not config.model.gradient_checkpointing,
            "trainer.precision=bf16-true": config.trainer.precision != "bf16-true",
            "model.offload_activations=true": not (cpu or config.model.offload_activations),
            "data.max_length (shorter rows)": True,
            "trainer=fsdp2 (a sharded base, on several GPUs)": not cpu,
        }
        raise UserError(
            f"out of memory: {reason.rstrip('.')}. Settings that help, cheapest first: "
            f"{', '.join(name for name, fits in helps.items() if fits)}. lora-lightning check "
            "with the same arguments shows the memory of a setting."
        ) from error
