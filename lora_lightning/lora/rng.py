"""Random numbers that leave no trace, and those that are the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores torch's generators at the end of the block: the CPU's, and that of a GPU.

    Args:
        device: where numbers are drawn. `torch.random.fork_rng` alone would fork all GPUs.
    """
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


@torch.no_grad()
def fill_by_cpu(matrix: Tensor, fill: Callable[..., Any], **settings: Any) -> None:
    """Gives a matrix the values that the CPU's generator draws, whatever device it is on.

    Args:
        matrix: to be filled; one without values (on "meta") takes no draws.
        fill: one of `torch.nn.init`.
        settings: further arguments of it.
    """
    if matrix.device.type == "meta":
        return
    drawn = torch.empty_like(matrix, device="cpu")
    fill(drawn, **settings)
    matrix.copy_(drawn)
