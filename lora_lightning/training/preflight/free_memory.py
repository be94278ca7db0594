"""Free memory of a GPU, or of this machine within the limits of its control groups."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

MEMBERSHIP = Path("/proc/self/cgroup")
"""Lists the control groups of this process."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or of this machine within its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """Return the bytes left by each memory limit of this process's cgroups, innermost first.

    A SLURM job has its own cgroup below the root. A container sees its own cgroup as the root.
    Cached files count as free, because the system drops them when memory runs short.
    """
    left = []
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # cgroup version 2
                root, names = CGROUPS, ("max", "current")
            elif "memory" in controllers.split(","):
                root, names = CGROUPS / "memory", ("limit_in_bytes", "usage_in_bytes")
            else:
                continue
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if not group.is_relative_to(root):
                    break
                with suppress(OSError, ValueError):  # no such file, or "max" for no limit
                    limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
                    stat = (group / "memory.stat").read_text().split()
                    cached = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                    left.append(limit - used + cached.get("inactive_file", 0))
    return left
