"""Private APIs of transformers and torch that this package reads or replaces for a while.

No other file of `models` and `inference` uses one. A test fails when one changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

CHECKED = {"transformers": "5.23.0", "torch": "2.13.0"}
"""Versions that these APIs were last checked with."""


# Read ------------------------------------------------------------------------------------------


def attention_of(model_config: Any) -> str | None:
    """Return the name of the attention implementation in a transformers config."""
    name = getattr(model_config, "_attn_implementation", None)
    return None if name is None else str(name)


def experts_of(model_config: Any) -> str | None:
    """Return the name of the experts' implementation in a transformers config."""
    name = getattr(model_config, "_experts_implementation", None)
    return None if name is None else str(name)


def set_kernels(model_config: Any, *, attention: str | None) -> None:
    """Set the attention of a transformers config, and the experts to transformers' choice."""
    model_config._attn_implementation = attention
    model_config._experts_implementation = None


def can_set_attention(model: Any) -> bool:
    """Return whether a transformers model looks up its attention by the name in its config."""
    return bool(type(model)._can_set_attn_implementation())


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def is_view_of_parameter(tensor: Tensor) -> bool:
    """Return whether a tensor is a view of a parameter."""
    return isinstance(tensor._base, nn.Parameter)


def fake_tensors() -> AbstractContextManager[Any]:
    """Give tensors that are made within the block a device, and no values."""
    return FakeTensorMode()


# Replaced for a while --------------------------------------------------------------------------


@contextmanager
def _replaced(module: str, name: str, function: Callable[..., Any]) -> Iterator[None]:
    owner: Any = import_module(module)
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def first_expert_only() -> AbstractContextManager[None]:
    """Route all rows through the first expert, because routing depends on values.

    A matmul holds the same memory, whichever experts take part in it.
    """

    def first(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return input.to(weight.dtype) @ weight[0]

    return _replaced("transformers.integrations.moe", "_grouped_mm", first)


def unpacked_rows() -> AbstractContextManager[None]:
    """Let transformers treat each row as one sequence, without a mask for packed sequences.

    transformers reads the position ids to detect packing, which fails for ids without values.
    """
    name = "find_packed_sequence_indices"
    return _replaced("transformers.masking_utils", name, lambda position_ids: None)


@contextmanager
def masks_without_waiting(device: torch.device) -> Iterator[None]:
    """Let transformers build every mask without asking a GPU whether the mask is needed.

    The answer is in GPU memory. To read it, the host waits for all launched kernels in each forward
    pass. transformers does not ask while it traces a graph. Within the block, transformers
    therefore treats every tensor as traced.

    A CPU has the answer at once and is faster without a mask.
    """
    if device.type == "cpu":
        yield
        return
    with _replaced("transformers.masking_utils", "is_tracing", lambda tensor=None: True):
        yield
