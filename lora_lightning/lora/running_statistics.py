"""Running statistics of normalization layers, which training changes without a gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of nn.BatchNorm1d and similar layers, changed by each forward pass of training."""


def is_statistic(name: str) -> bool:
    """Return whether a buffer of that name is a running statistic."""
    return name.rpartition(".")[2] in STATISTICS


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of a model by name, part of an adapter trained on it.

    A loaded adapter needs them, because the base's statistics belong to other outputs of the
    preceding layers. PEFT stores no statistics, but reads them by these names.
    """
    return {name: buffer for name, buffer in model.named_buffers() if is_statistic(name)}


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether a layer has running statistics of its own."""
    return any(module._buffers.get(name) is not None for name in STATISTICS)


def buffer_checksums(model: nn.Module, skip: Iterable[Tensor]) -> dict[str, float]:
    """Return checksums of a model's stored floating-point buffers (fp32 and fp64) by name.

    Args:
        model: the whole model.
        skip: buffers to skip.
    """
    known = {id(tensor) for tensor in skip}
    return {
        f"{path}.{leaf}".removeprefix("."): float(buffer.detach().double().square().sum())
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
        if id(buffer) not in known and buffer.dtype in (torch.float32, torch.float64)
        if not buffer.is_meta
    }


def check_buffers_unchanged(before: dict[str, float], now: dict[str, float]) -> None:
    """Raise UserError if a buffer of the frozen base has changed, since no adapter stores it."""
    moved = [name for name, value in before.items() if now.get(name, value) != value]
    if moved:
        module = moved[0].rpartition(".")[0]
        raise UserError(
            f"training changes {moved[0]}, a buffer of the frozen base that no adapter stores. Set "
            f"lora.modules_to_save=[{module}]."
        )
