"""Copies of an adapter's matrices in the dtype of a 16-bit base, all made at once.

Code that stores autograd's saved tensors elsewhere can use `source_of` and `is_kept`. These
distinguish copies of parameters from activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

_Matrices = tuple[Tensor, ...]
_Key = tuple[torch.dtype, tuple[int, ...]]
"""A dtype and the identities of matrices."""
_SOURCE, _KEPT = "_lora_source", "_lora_kept"
"""Names of tensor attributes."""


class Casts:
    """Copies for one forward pass and its backward pass, made at the first request.

    Each new pass reads the current values, so it misses no change between passes. This includes
    changes that leave a tensor's version as it is, by a fused optimizer or `Parameter.data`.

    Outside of a pass each request casts the matrix. A backward pass is the exception, because
    gradient checkpointing then repeats the forward pass with the same values.
    """

    def __init__(self) -> None:
        self._copies: dict[_Key, tuple[int, Tensor]] | None = None
        """Copies of the last pass, with the versions of their sources."""
        self._open = False
        """Whether that pass is still open."""
        self._batches: list[_Batch] = []
        """Matrices that passes request, in batches."""
        self._made = False
        """Whether this pass has copied the batches."""
        self._requests: dict[_Key, _Matrices] = {}
        """Other matrices that this pass has requested."""

    def begin(self) -> None:
        """Begin a pass."""
        if self._requests:
            # Incomplete batches may also hold too much, so all requests are collected again.
            self._batches = [] if self._batches else _batches(self._requests)
            self._requests = {}
        self._copies, self._open, self._made = {}, True, False

    def end(self, *, failed: bool) -> None:
        """End a pass."""
        self._open = False
        if failed or not torch.is_grad_enabled():
            self._copies = None  # there is no backward pass

    def cast(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a matrix in a dtype, without a gradient."""
        if matrix.dtype == dtype or not self._serves() or matrix.is_inference():
            return matrix.detach().to(dtype)
        return self._find((matrix,), matrix._version, (dtype, (id(matrix),)))

    def join(self, matrices: _Matrices, dtype: torch.dtype) -> Tensor:
        """Return matrices of equal width stacked vertically, in a dtype and without a gradient."""
        if not self._serves() or any(matrix.is_inference() for matrix in matrices):
            return _joined(matrices, dtype)
        return self._find(matrices, _version(matrices), (dtype, tuple(map(id, matrices))))

    def _serves(self) -> bool:
        if self._open:
            return True
        # The id of the current backward pass, or -1. torch.utils.checkpoint uses the same call.
        return self._copies is not None and torch._C._current_graph_task_id() != -1

    def _find(self, matrices: _Matrices, version: int, key: _Key) -> Tensor:
        assert self._copies is not None
        # Inference mode is off because its tensors cannot be saved for a backward pass.
        if not self._made:
            self._made = True
            with torch.inference_mode(False), torch.no_grad():
                for batch in self._batches:
                    self._copies.update(batch.copies())
        cached = self._copies.get(key)
        if cached is not None and cached[0] == version:
            return cached[1]
        with torch.inference_mode(False), torch.no_grad():
            copy = _joined(matrices, key[0])
        if self._open and all(isinstance(matrix, nn.Parameter) for matrix in matrices):
            setattr(copy, _KEPT, True)
            self._copies[key] = version, copy
            if cached is None:
                self._requests[key] = matrices
        return copy


def cast_frozen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a frozen tensor in a dtype. A copy refers to its source."""
    copy = tensor.to(dtype)
    if not torch.compiler.is_compiling() and copy is not tensor:
        setattr(copy, _SOURCE, tensor)
    return copy


def source_of(tensor: Tensor) -> Tensor | None:
    """Return the source of a copy that `cast_frozen` made in another dtype, else None."""
    return getattr(tensor, _SOURCE, None)


def is_kept(tensor: Tensor) -> bool:
    """Return whether a tensor is a copy of a pass, which exists as long as the pass."""
    return hasattr(tensor, _KEPT)


def _version(matrices: _Matrices) -> int:
    """Return a number that grows with each change that torch tracks."""
    return sum(matrix._version for matrix in matrices)


def _joined(matrices: _Matrices, dtype: torch.dtype) -> Tensor:
    if len(matrices) == 1:
        return matrices[0].detach().to(dtype)
    return torch.cat([matrix.detach() for matrix in matrices]).to(dtype)


class _Batch:
    """Matrices on one device that one kernel copies to one dtype.

    Args:
        requests: the matrices by the keys of their copies.
    """

    def __init__(self, requests: dict[_Key, _Matrices]) -> None:
        self._requests = requests
        self._matrices = [matrix for matrices in requests.values() for matrix in matrices]
        self._device = self._matrices[0].device
        self._dtype = next(iter(requests))[0]

    def copies(self) -> dict[_Key, tuple[int, Tensor]]:
        """Return copies with the versions of their sources, or none if a matrix has moved."""
        if any(matrix.device != self._device for matrix in self._matrices):
            return {}
        size = sum(matrix.numel() for matrix in self._matrices)
        memory = torch.empty(size, dtype=self._dtype, device=self._device)
        parts = _unflatten_dense_tensors(memory, self._matrices)
        torch._foreach_copy_(parts, self._matrices)
        copies = {}
        start = place = 0
        for key, matrices in self._requests.items():
            copy = parts[place]
            if len(matrices) > 1:
                rows = sum(len(matrix) for matrix in matrices)
                copy = memory[start : start + rows * copy.shape[1]].view(rows, -1)
            setattr(copy, _KEPT, True)
            copies[key] = _version(matrices), copy
            start += copy.numel()
            place += len(matrices)
        return copies


def _batches(requests: dict[_Key, _Matrices]) -> list[_Batch]:
    kinds: dict[Any, dict[_Key, _Matrices]] = {}
    for key, matrices in requests.items():
        kinds.setdefault((matrices[0].device, key[0]), {})[key] = matrices
    return [_Batch(kind) for kind in kinds.values()]
