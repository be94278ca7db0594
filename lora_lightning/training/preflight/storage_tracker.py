"""Tracker of live tensors in bytes by part, and of their peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class StorageTracker(TorchDispatchMode):
    """Dispatch mode that counts the storage of all tensors created under it, until they are freed.

    Memory that a kernel allocates and frees internally is not counted. Fake tensors
    (FakeTensorMode) count like real ones, so a dry run works for a step of any size.

    Args:
        device_type: Type of the device whose tensors are counted.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.part = ""
        """Part that new tensors are assigned to."""
        self.now: Counter[str] = Counter()
        """Live bytes by part."""
        self.peak: Counter[str] = Counter()
        """Live bytes by part when their sum was highest."""
        self._storages: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self._see(tensor.untyped_storage())
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        entry = [self.part, storage.nbytes()]  # a list, because `assign` may change the part
        self._storages[storage] = entry
        self.now[self.part] += storage.nbytes()
        weakref.finalize(storage, self._forget, entry).atexit = False

    def _forget(self, entry: list[Any]) -> None:
        part, size = entry
        self.now[part] -= size

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Assign live tensors to another part."""
        for tensor in tensors:
            entry = self._storages.get(tensor.untyped_storage())
            if entry is not None:
                self.now[entry[0]] -= entry[1]
                self.now[part] += entry[1]
                entry[0] = part
