"""Which tensors are alive, in bytes and by part, and where their sum was highest."""

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


class Alive(TorchDispatchMode):
    """Counts the storage of all tensors that come up under it, until they are gone.

    What a kernel takes for itself and gives back is not seen. Tensors without values
    (FakeTensorMode) count like real ones, so a step of any size can be gone through.

    Args:
        device_type: where the tensors lie that count.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.part = ""
        """The part that new tensors belong to."""
        self.now: Counter[str] = Counter()
        """Bytes alive, by part."""
        self.peak: Counter[str] = Counter()
        """The same at the moment when there were most of them."""
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
        entry = [self.part, storage.nbytes()]  # its part may change, see `assign`
        self._storages[storage] = entry
        self.now[self.part] += storage.nbytes()
        weakref.finalize(storage, self._forget, entry).atexit = False

    def _forget(self, entry: list[Any]) -> None:
        part, size = entry
        self.now[part] -= size

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Makes tensors that are alive belong to another part."""
        for tensor in tensors:
            entry = self._storages.get(tensor.untyped_storage())
            if entry is not None:
                self.now[entry[0]] -= entry[1]
                self.now[part] += entry[1]
                entry[0] = part
