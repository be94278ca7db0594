"""Private attributes of Lightning that have no public counterpart in version 2.6."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy


def uses_distributed_sampler(trainer: Trainer) -> bool:
    """Return whether the Trainer replaces samplers by its own for several ranks."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def set_mesh_size(strategy: ModelParallelStrategy, data: int, tensor: int) -> None:
    """Set the two sizes of the device mesh that the strategy sets up.

    Its arguments of these sizes are fixed before the number of ranks is known.
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = data, tensor


def process_group_backend(strategy: DDPStrategy) -> str | None:
    """Return the backend of torch.distributed that the strategy uses."""
    return strategy._process_group_backend


def after_closure(strategy: DDPStrategy, optimizer: Any) -> None:
    """Run the hooks between backward pass and optimizer step, such as gradient clipping."""
    assert strategy.lightning_module is not None
    strategy.precision_plugin._after_closure(strategy.lightning_module, optimizer)
