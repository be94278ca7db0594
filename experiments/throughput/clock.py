"""What every contestant measures in its own process, and how: the end of each optimizer step."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import torch


class Clock:
    """Notes each step's end and loss; after the last step writes what was measured to a file.

    The environment tells what is expected: BENCH_STARTED (time.time() at which the command was
    given), BENCH_STEPS, and BENCH_RESULT (the file). The file appears whole.
    """

    def __init__(self) -> None:
        self.started = float(os.environ["BENCH_STARTED"])
        self.steps = int(os.environ["BENCH_STEPS"])
        self.ends: list[float] = []
        self.losses: list[float] = []

    def step(self) -> None:
        """An optimizer step has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time() - self.started)

    def loss(self, value: float) -> None:
        """The mean loss of a step, which may be known only after its end."""
        self.losses.append(value)
        if len(self.losses) == self.steps:
            self._write()

    def _write(self) -> None:
        measured = {
            "ends": self.ends,
            "losses": self.losses,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        }
        if torch.cuda.is_available():
            measured["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        path = Path(os.environ["BENCH_RESULT"])
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(measured))
        beside.replace(path)
