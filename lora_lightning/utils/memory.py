"""Peak memory of a device or of this process."""

from __future__ import annotations

import sys

import torch


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of the GPU if training ran on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
