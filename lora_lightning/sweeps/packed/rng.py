"""Random numbers of runs that share a process, with separate generators for each run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_lightning.lora.batched import Stack
from lora_lightning.models.cpu_kernels import dropout_mask


class SlotwiseRandomness(TorchFunctionMode):
    """Mode that draws dropout's random numbers slot by slot, from each slot's generators."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()))
        rows = first.shape[0]
        slots = [slot for slot, _ in self.stack.parts(rows)]

        def shares(value: Any) -> Sequence[Any]:
            whole = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
            # Each slice would cost a pass over all rows in the backward pass; chunk() does not.
            return value.chunk(len(slots)) if whole else [value] * len(slots)

        own = [shares(value) for value in args]
        named = {name: shares(value) for name, value in kwargs.items()}
        found = []
        for place, slot in enumerate(slots):
            with self.stack.randomness(slot):
                found.append(
                    func(
                        *(value[place] for value in own),
                        **{name: value[place] for name, value in named.items()},
                    )
                )
        return torch.cat(found)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call draws random numbers: dropout, its mask, or attention with dropout."""
    if func is dropout_mask:
        return True
    name = getattr(func, "__name__", "")
    if name == "dropout":
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and p > 0.0
    if name == "scaled_dot_product_attention":
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0.0)
    return False


def random_state() -> tuple[Any, ...]:
    """Return the state of all generators."""
    return *torch_state(), random.getstate(), np.random.get_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set all generators to a state from `random_state`."""
    *of_torch, python, numpy = state
    set_torch_state(*of_torch)
    random.setstate(python)
    np.random.set_state(numpy)


def torch_state() -> tuple[Tensor, Tensor | None]:
    """Return the state of torch's CPU and GPU generators, which a forward pass draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def set_torch_state(cpu: Tensor, cuda: Tensor | None) -> None:
    """Set torch's generators to a state from `torch_state`."""
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
