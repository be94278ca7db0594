"""Random numbers that leave no trace, or are the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores torch's CPU generator and one GPU's generator on exit.

    Args:
        device: the device of the draws. `torch.random.fork_rng` by default forks all GPUs.
    """
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


@torch.no_grad()
def fill_by_cpu(matrix: Tensor, fill: Callable[..., Any], **settings: Any) -> None:
    """Fill a matrix on any device with values from the CPU's generator.

    Args:
        matrix: the matrix to fill. A matrix without values (on "meta") takes no draws.
        fill: a function of `torch.nn.init`.
        settings: further arguments of `fill`.
    """
    if matrix.device.type == "meta":
        return
    drawn = torch.empty_like(matrix, device="cpu")
    fill(drawn, **settings)
    matrix.copy_(drawn)
