"""Random numbers that leave no trace."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores torch's generators at the end of the block: the CPU's, and that of a GPU.

    Args:
        device: where numbers are drawn. `torch.random.fork_rng` alone would fork all GPUs.
    """
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)
