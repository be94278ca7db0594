"""TF32 in fp32 matmuls on a GPU, switched for a block of code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .hardware_speed import is_on_gpu


@contextmanager
def tf32_matmuls(precision: str, accelerator: str) -> Iterator[None]:
    """Let fp32 matmuls on a GPU use TF32 within the block, unless the precision is 32-true.

    The setting is global to the process. Threads of a packed sweep enter and leave the block at
    different times, so TF32 stays on until the last one leaves.

    Args:
        precision: A resolved precision, one of `MODES`.
        accelerator: `trainer.accelerator`.
    """
    if precision == "32-true" or not is_on_gpu(accelerator):
        yield
        return
    _TF32.enter()
    try:
        yield
    finally:
        _TF32.leave()


class _Tf32:
    """Reference count of the blocks that need TF32, which is on while the count is positive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before = "highest"

    def enter(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("high")
            self._blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                torch.set_float32_matmul_precision(self._before)


_TF32 = _Tf32()
