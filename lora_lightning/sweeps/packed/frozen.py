"""One copy of the frozen base for all runs of a pack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_lightning.lora import UserError
from lora_lightning.lora.layers.lora_layer import LoraLayer
from lora_lightning.lora.running_statistics import is_statistic


def share_frozen(model: nn.Module, first: nn.Module) -> None:
    """Replace a model's frozen tensors by the equal tensors of the first model."""
    shared = _frozen(first)
    for name, (module, leaf, tensor) in _frozen(model).items():
        if name not in shared:
            continue
        other = shared[name][2]
        if other is tensor:
            continue
        if not torch.equal(other, tensor.to(other.device)):
            raise UserError(
                f"hydra/launcher=packed: the frozen tensor {name} must be equal in all jobs. "
                "Use hydra/launcher=process."
            )
        store = module._parameters if leaf in module._parameters else module._buffers
        store[leaf] = other  # type: ignore[assignment]


def _frozen(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return the frozen parameters and buffers of the base, by name in the bare model."""
    frozen = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLayer):
            continue  # its own parameters may be frozen too
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not tensor.requires_grad and not is_statistic(leaf):
                name = f"{path}.{leaf}".replace(".base_layer.", ".")
                frozen[name] = (module, leaf, tensor)
    return frozen
