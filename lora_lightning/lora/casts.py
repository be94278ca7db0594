"""Copies of an adapter's matrices in the type of a 16-bit base, all made at once.

Who keeps what autograd saves elsewhere can tell copies of parameters from activations, by
`source_of` and `is_kept`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

_Matrices = tuple[Tensor, ...]
_Key = tuple[torch.dtype, tuple[int, ...]]
"""A type, and the identities of matrices."""
_SOURCE, _KEPT = "_lora_source", "_lora_kept"
"""Attributes of tensors."""


class Casts:
    """Copies that serve one forward pass and its backward pass, made when it first asks for one.

    A new pass takes the values as they are, so that no change between passes is missed: not even
    one by a fused optimizer or through `Parameter.data`, which leave a tensor's version as it is.
    Outside of a pass a matrix is cast when it is asked for, except in a backward pass: there
    gradient checkpointing repeats the forward pass, of the same values.
    """

    def __init__(self) -> None:
        self._copies: dict[_Key, tuple[int, Tensor]] | None = None
        """Those of the last pass, with the versions of what they were made from."""
        self._open = False
        """Whether that pass is not over."""
        self._batches: list[_Batch] = []
        """What passes ask for."""
        self._made = False
        """Whether this pass has copied that."""
        self._asked: dict[_Key, _Matrices] = {}
        """What else this pass has asked for."""

    def begin(self) -> None:
        """Begins a pass."""
        if self._asked:
            # Batches that lack something may have too much: all is asked for once more then.
            self._batches = [] if self._batches else _batches(self._asked)
            self._asked = {}
        self._copies, self._open, self._made = {}, True, False

    def end(self, *, failed: bool) -> None:
        """Ends a pass."""
        self._open = False
        if failed or not torch.is_grad_enabled():
            self._copies = None  # there is no backward pass

    def cast(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """A matrix in a type, without a gradient."""
        if matrix.dtype == dtype or not self._serves() or matrix.is_inference():
            return matrix.detach().to(dtype)
        return self._find((matrix,), matrix._version, (dtype, (id(matrix),)))

    def join(self, matrices: _Matrices, dtype: torch.dtype) -> Tensor:
        """Matrices of equal width one below the other, in a type and without a gradient."""
        if not self._serves() or any(matrix.is_inference() for matrix in matrices):
            return _joined(matrices, dtype)
        return self._find(matrices, _version(matrices), (dtype, tuple(map(id, matrices))))

    def _serves(self) -> bool:
        if self._open:
            return True
        # The number of a backward pass, if there is one: torch.utils.checkpoint asks so too.
        return self._copies is not None and torch._C._current_graph_task_id() != -1

    def _find(self, matrices: _Matrices, version: int, key: _Key) -> Tensor:
        assert self._copies is not None
        # Not in inference mode: what that makes cannot be saved for a backward pass.
        if not self._made:
            self._made = True
            with torch.inference_mode(False), torch.no_grad():
                for batch in self._batches:
                    self._copies.update(batch.copies())
        found = self._copies.get(key)
        if found is not None and found[0] == version:
            return found[1]
        with torch.inference_mode(False), torch.no_grad():
            copy = _joined(matrices, key[0])
        if self._open and all(isinstance(matrix, nn.Parameter) for matrix in matrices):
            setattr(copy, _KEPT, True)
            self._copies[key] = version, copy
            if found is None:
                self._asked[key] = matrices
        return copy


def cast_frozen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen tensor in a type; a copy knows its source."""
    copy = tensor.to(dtype)
    if not torch.compiler.is_compiling() and copy is not tensor:
        setattr(copy, _SOURCE, tensor)
    return copy


def source_of(tensor: Tensor) -> Tensor | None:
    """What a tensor is a copy of in another type, if `cast_frozen` made it."""
    return getattr(tensor, _SOURCE, None)


def is_kept(tensor: Tensor) -> bool:
    """Whether a tensor is one of the copies of a pass, which exist as long as that."""
    return hasattr(tensor, _KEPT)


def _version(matrices: _Matrices) -> int:
    """What grows with each change that torch takes notice of."""
    return sum(matrix._version for matrix in matrices)


def _joined(matrices: _Matrices, dtype: torch.dtype) -> Tensor:
    if len(matrices) == 1:
        return matrices[0].detach().to(dtype)
    return torch.cat([matrix.detach() for matrix in matrices]).to(dtype)


class _Batch:
    """Matrices on one device that are copied to one type by one kernel.

    Args:
        asked: the matrices by the keys of their copies.
    """

    def __init__(self, asked: dict[_Key, _Matrices]) -> None:
        self._asked = asked
        self._matrices = [matrix for matrices in asked.values() for matrix in matrices]
        self._device = self._matrices[0].device
        self._dtype = next(iter(asked))[0]

    def copies(self) -> dict[_Key, tuple[int, Tensor]]:
        """Copies with the versions of what they were made from; none if a matrix has moved."""
        if any(matrix.device != self._device for matrix in self._matrices):
            return {}
        size = sum(matrix.numel() for matrix in self._matrices)
        memory = torch.empty(size, dtype=self._dtype, device=self._device)
        parts = _unflatten_dense_tensors(memory, self._matrices)
        torch._foreach_copy_(parts, self._matrices)
        made = {}
        start = place = 0
        for key, matrices in self._asked.items():
            copy = parts[place]
            if len(matrices) > 1:
                rows = sum(len(matrix) for matrix in matrices)
                copy = memory[start : start + rows * copy.shape[1]].view(rows, -1)
            setattr(copy, _KEPT, True)
            made[key] = _version(matrices), copy
            start += copy.numel()
            place += len(matrices)
        return made


def _batches(asked: dict[_Key, _Matrices]) -> list[_Batch]:
    kinds: dict[Any, dict[_Key, _Matrices]] = {}
    for key, matrices in asked.items():
        kinds.setdefault((matrices[0].device, key[0]), {})[key] = matrices
    return [_Batch(kind) for kind in kinds.values()]
