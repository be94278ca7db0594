"""Activations in the CPU's memory between the forward pass and the backward pass."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.lora.casts import is_kept, source_of

SMALLEST = 1024
"""Elements of the smallest tensor that is moved: for less a copy costs more than it frees."""
ON_THE_WAY = 5
"""Tensors that may wait for their copies at a time, each way."""
_STREAMS: dict[str, Any] = {"cuda": torch.cuda}
"""By type of device: what has its streams. Others copy at once."""


class _Moved(NamedTuple):
    """A tensor that has been copied to the CPU."""

    device: torch.device
    copy: Tensor


class _Cast(NamedTuple):
    """A frozen weight in another type, to be made again."""

    source: Tensor
    dtype: torch.dtype


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """Keeps in the CPU's memory what autograd saves under it.

    Parameters stay where they are, and so do small tensors and casts of A and B, which exist in any
    case. Casts of frozen weights are made again when they are needed, or stay.

    On a GPU copies have a stream of their own, so that they overlap with computing. The idea is
    torchtune's (`OffloadActivations`): what is copied out is held until the copy is made, and what
    is copied back is fetched no more than a few tensors ahead.

    Args:
        model: whose activations they are.
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
        # Asked here, since within an operation autocast is off.
        cast = {p.shape for p in frozen if torch.is_autocast_enabled(p.device.type)}
        self._weights = cast | {shape[::-1] for shape in cast}
        """Shapes of casts of frozen weights, as products take them."""
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        """What is copied out, with the events of its copies."""
        self._returning: deque[Any] = deque()
        """Events of what was computed before each of the last that was copied back."""

    def pack(self, tensor: Tensor) -> Tensor | _Moved | _Cast:
        """What is kept of a tensor."""
        if (source := source_of(tensor)) is not None:
            return _Cast(source, tensor.dtype)
        if self._stays(tensor):
            return tensor
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        streams = _STREAMS.get(tensor.device.type)
        if streams is None:
            return _Moved(tensor.device, copy.copy_(tensor))
        # That which is current now: a model may compute in several.
        current, stream = streams.current_stream(tensor.device), _stream(tensor.device)
        stream.wait_stream(current)
        with streams.stream(stream):
            copy.copy_(tensor, non_blocking=True)
        # Held until what is computed later waits for its copy: then the memory may be used again.
        self._leaving.append((tensor.detach(), stream.record_event()))
        if len(self._leaving) > ON_THE_WAY:
            current.wait_event(self._leaving.popleft()[1])
        return _Moved(tensor.device, copy)

    def unpack(self, packed: Tensor | _Moved | _Cast) -> Tensor:
        """The tensor again."""
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _Cast):
            return packed.source.to(packed.dtype)
        device, copy = packed
        streams = _STREAMS.get(device.type)
        if streams is None:
            return copy.to(device)
        current, stream = streams.current_stream(device), _stream(device)
        if len(self._returning) == ON_THE_WAY:  # or all would come back at once
            self._returning.popleft().synchronize()
        self._returning.append(current.record_event())
        with streams.stream(stream):
            tensor = copy.to(device, non_blocking=True)
        current.wait_stream(stream)
        tensor.record_stream(current)  # its memory is the other stream's
        return tensor

    def finish(self) -> None:
        """Lets go of all that has been copied out."""
        while self._leaving:
            tensor, event = self._leaving.popleft()
            _STREAMS[tensor.device.type].current_stream(tensor.device).wait_event(event)

    def _stays(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        if tensor.numel() < SMALLEST or is_kept(tensor):
            return True
        # What autocast makes of the weight of a layer without an adapter tells nothing of itself.
        return tensor.shape in self._weights and not tensor.requires_grad


@functools.cache
def _stream(device: torch.device) -> Any:
    """The stream of a device that copies are made in."""
    return _STREAMS[device.type].Stream(device)
