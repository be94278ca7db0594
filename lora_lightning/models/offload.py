"""Offload of activations to CPU memory between the forward pass and the backward pass."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.lora.casts import is_kept, source_of

from .private_api import is_view_of_parameter

MIN_ELEMENTS = 1024
"""Minimum elements of an offloaded tensor; a copy of a smaller one costs more than it frees."""
MAX_PENDING = 5
"""Maximum number of tensors with pending copies, in each direction."""
_STREAMS: dict[str, Any] = {"cuda": torch.cuda}
"""Module with the stream functions, by device type. Other device types copy synchronously."""


class _Moved(NamedTuple):
    """A tensor that was copied to the CPU."""

    device: torch.device
    copy: Tensor


class _Cast(NamedTuple):
    """A cast of a frozen weight, to recompute from its source."""

    source: Tensor
    dtype: torch.dtype


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """Keep tensors that autograd saves within the block in CPU memory.

    Parameters and small tensors stay on their device. Casts of A and B also stay, because they
    exist anyway. Casts of frozen weights are recomputed when needed, or stay.

    On a GPU, copies run in a separate stream, so they overlap with computation. The idea comes from
    torchtune (`OffloadActivations`). A tensor that is copied out is held until its copy is
    complete. Tensors are copied back at most a few tensors ahead.

    Args:
        model: Model whose activations are offloaded.
    """
    moving = _Moving(model)
    try:
        with torch.autograd.graph.saved_tensors_hooks(moving.pack, moving.unpack):
            yield
    finally:
        moving.finish()


class _Moving:
    """Tensors on their way to the CPU and back."""

    def __init__(self, model: nn.Module) -> None:
        frozen = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad]
        # Check autocast here, because it is off within an operation.
        cast = {p.shape for p in frozen if torch.is_autocast_enabled(p.device.type)}
        self._weights = cast | {shape[::-1] for shape in cast}
        """Shapes of casts of frozen weights as used in matmuls, so also transposed."""
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        """Tensors that are being copied out, with the events of their copies."""
        self._returning: deque[Any] = deque()
        """Events recorded before each of the latest copies back."""

    def pack(self, tensor: Tensor) -> Tensor | _Moved | _Cast:
        """Return what autograd saves in place of a tensor."""
        if (source := source_of(tensor)) is not None:
            return _Cast(source, tensor.dtype)
        if self._stays(tensor):
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        streams = _STREAMS.get(tensor.device.type)
        if streams is None:
            return _Moved(tensor.device, copy.copy_(tensor))
        # Look up the current stream each time, because a model may compute in several.
        current, stream = streams.current_stream(tensor.device), _stream(tensor.device)
        stream.wait_stream(current)
        with streams.stream(stream):
            copy.copy_(tensor, non_blocking=True)
        # Hold the tensor until later computation waits for its copy. Its memory can then be reused.
        self._leaving.append((tensor.detach(), stream.record_event()))
        if len(self._leaving) > MAX_PENDING:
            current.wait_event(self._leaving.popleft()[1])
        return _Moved(tensor.device, copy)

    def unpack(self, packed: Tensor | _Moved | _Cast) -> Tensor:
        """Restore a packed tensor."""
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _Cast):
            return packed.source.to(packed.dtype)
        device, copy = packed
        streams = _STREAMS.get(device.type)
        if streams is None:
            return copy.to(device)
        current, stream = streams.current_stream(device), _stream(device)
        if len(self._returning) == MAX_PENDING:  # otherwise all tensors come back at once
            self._returning.popleft().synchronize()
        self._returning.append(current.record_event())
        with streams.stream(stream):
            tensor = copy.to(device, non_blocking=True)
        current.wait_stream(stream)
        tensor.record_stream(current)  # its memory belongs to the copy stream
        return tensor

    def finish(self) -> None:
        """Release all tensors that were copied out."""
        while self._leaving:
            tensor, event = self._leaving.popleft()
            _STREAMS[tensor.device.type].current_stream(tensor.device).wait_event(event)

    def _stays(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or is_view_of_parameter(tensor):
            return True
        if tensor.numel() < MIN_ELEMENTS or is_kept(tensor):
            return True
        # Autocast's cast of a weight without an adapter carries no mark, so compare shapes.
        return tensor.shape in self._weights and not tensor.requires_grad


@functools.cache
def _stream(device: torch.device) -> Any:
    """Return a device's stream for copies."""
    return _STREAMS[device.type].Stream(device)
