"""What training moves without a gradient: the running statistics of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of nn.BatchNorm1d and its kin, which each forward pass of training changes."""


def is_statistic(name: str) -> bool:
    """Whether a buffer of that name is one."""
    return name.rpartition(".")[2] in STATISTICS


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of a model by name; they belong to an adapter that is trained on it.

    Whoever loads the adapter needs them: the base's own belong to other outputs of the layers
    before. PEFT stores none, and reads them by these names.
    """
    return {name: buffer for name, buffer in model.named_buffers() if is_statistic(name)}


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer has some of its own."""
    return any(module._buffers.get(name) is not None for name in STATISTICS)


def checksums(model: nn.Module, but: Iterable[Tensor]) -> dict[str, float]:
    """By the names of a model's stored buffers of real numbers, what changes when they do.

    Args:
        model: the whole.
        but: buffers that are passed over.
    """
    known = {id(tensor) for tensor in but}
    return {
        f"{path}.{leaf}".removeprefix("."): float(buffer.detach().double().square().sum())
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
        if id(buffer) not in known and buffer.dtype in (torch.float32, torch.float64)
        if not buffer.is_meta
    }


def refuse_moved(before: dict[str, float], now: dict[str, float]) -> None:
    """Raises UserError where a buffer of the frozen base has changed, which nothing would store."""
    moved = [name for name, value in before.items() if now.get(name, value) != value]
    if moved:
        module = moved[0].rpartition(".")[0]
        raise UserError(
            f"training changes {moved[0]}, a buffer of the frozen base, which no adapter stores: "
            f"store its module too, lora.modules_to_save=[{module}]."
        )
