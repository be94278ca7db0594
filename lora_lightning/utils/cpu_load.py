"""Load of the machine's cores by other processes."""

from __future__ import annotations

import os
import time

MIN_LOAD = 0.25
"""Minimum load of other processes that triggers a warning, as a share of the machine's cores."""
SECONDS = 0.2
"""Seconds over which busy cores are measured."""


def load_warning(threads: int) -> str | None:
    """Return a warning if other processes occupy cores that this run's threads need, else None.

    Threads of a matmul wait for the slowest one, which may wait for a core.

    Args:
        threads: Number of threads of this run.
    """
    cores = os.cpu_count() or 1
    others = _load_of_others()
    if others >= MIN_LOAD * cores:  # the load still includes processes that ended a moment ago
        others = min(others, _busy_cores(cores))
    if others < MIN_LOAD * cores or threads <= 1 or threads <= cores - others:
        return None
    free = max(1, int(cores - others))
    return (
        f"other processes keep {others:.1f} of this machine's {cores} cores busy, and this run has "
        f"{threads} threads that wait for each other. It may take ten times as long: put "
        f"OMP_NUM_THREADS={free} before the command."
    )


def _load_of_others() -> float:
    """Return the mean load of the last minute, without this process."""
    try:
        return os.getloadavg()[0] - min(1.0, time.process_time() / 60)
    except (OSError, AttributeError):
        return 0.0


def _busy_cores(cores: int) -> float:
    """Return the number of busy cores while this process sleeps, all cores if unknown."""
    import psutil

    try:
        return cores * float(psutil.cpu_percent(SECONDS)) / 100
    except OSError:
        return float(cores)
