"""Kernels by the names of the operations that launch them, and a GPU's ways on a CPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning.lora import functional

# Operations that change what a tensor says of its memory and launch no kernel.
FREE = (
    *("view", "_unsafe_view", "alias", "detach", "as_strided", "expand", "select", "slice"),
    *("split", "squeeze", "unbind", "unsqueeze", "permute", "transpose", "t.default"),
)


class Kernels(TorchDispatchMode):
    """Counts what launches a kernel in `count`; allocations are counted too, to be strict.

    Stands in for what a GPU has and a CPU has not: a product of 16-bit matrices written as fp32.
    """

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.__name__.startswith(FREE):
            self.count[func.__name__] += 1
        if func is torch.ops.aten.mm.dtype:
            left, right, dtype = args
            return torch.mm(left.to(dtype), right.to(dtype))
        return func(*args, **(kwargs or {}))


def like_a_gpu(monkeypatch):
    """Has products joined and written in fp32 on a CPU as they are on a GPU; needs `Kernels`.

    Models that are loaded afterwards have transformers' own attention.
    """
    monkeypatch.setattr("lora_lightning.models.cpu_kernels._take_attention", lambda model: None)
    monkeypatch.setattr(functional, "GROUPED_ON", ("cpu",))
    monkeypatch.setattr(functional, "_try_float32", lambda device, dtype: dtype.itemsize == 2)
