"""Adapters side by side on one frozen model: a batch of which each adapter has a share of the rows.

The rows of a stacked batch belong to slots, equally many to each and in their order. A frozen layer
is computed once for all of them; what belongs to a slot, its A and B above all, sees the rows of
that slot alone, through the same products as if it were by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .functional import _down, _low_rank_backward
from .layer import LoraLayer


@dataclass
class Stack:
    """The slots whose rows a batch holds at the moment."""

    slots: list[int] = field(default_factory=list)
    """Numbers of the slots, in the order of their rows."""
    randomness: Callable[[int], AbstractContextManager[Any]] = lambda slot: nullcontext()
    """Enters a slot's own random state; what is drawn within is the slot's."""

    @contextmanager
    def of(self, slots: list[int]) -> Iterator[None]:
        """Says whose rows the batch of the block holds."""
        self.slots = slots
        try:
            yield
        finally:
            self.slots = []

    def parts(self, rows: int) -> Iterator[tuple[int, slice]]:
        """Each slot, and its share of so many rows.

        Raises:
            UserError: the rows cannot be shared out: the model has changed their order or number.
        """
        each, rest = divmod(rows, len(self.slots))
        if rest:
            raise UserError(
                f"a layer of this model sees {rows} rows of {len(self.slots)} stacked adapters, so "
                "it mixes rows, and its adapters cannot be trained together. Use the process "
                "launcher: hydra/launcher=process."
            )
        for index, slot in enumerate(self.slots):
            yield slot, slice(index * each, (index + 1) * each)


class StackedLayer(nn.Module):
    """A layer of which each slot has its own: an adapted one, or one that is trained whole.

    Where all are LoRA layers on one plain weight, h = W0 x is computed once for all rows, and each
    slot's s B A x is added to its own. Otherwise each slot's layer is called with its rows.

    Args:
        layers: the slots' layers, by slot.
        stack: whose rows a batch holds.
    """

    def __init__(self, layers: dict[int, nn.Module], stack: Stack) -> None:
        super().__init__()
        self._layers = layers  # not registered: they belong to the slots' models
        self._stack = stack

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers = [self._layers[slot] for slot in self._stack.slots]
        weight = None if args or kwargs else _common_weight(layers)
        autocast = torch.is_autocast_enabled(x.device.type)
        if weight is None or not (autocast or weight.dtype == x.dtype):
            outputs = []
            for slot, part in self._stack.parts(x.shape[0]):
                with self._stack.randomness(slot):
                    outputs.append(self._layers[slot](x[part], *args, **kwargs))
            return torch.cat(outputs)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        bias: Tensor | None = layers[0].base_layer.bias  # type: ignore[assignment, union-attr]
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        parts = list(self._stack.parts(rows.shape[0]))
        matrices = [getattr(layer, name) for layer in layers for name in ("lora_A", "lora_B")]
        output: Tensor = _StackedLinear.apply(
            rows,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            [(layer.scaling, layer._dropout_now()) for layer in layers],  # type: ignore[operator]
            parts,
            self._stack.randomness,
            *matrices,
        )
        return output.view(*x.shape[:-1], weight.shape[0])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Model code reads `weight`, `in_features` and the like of a layer.
            return getattr(next(iter(self.__dict__["_layers"].values())), name)


def _common_weight(layers: list[nn.Module]) -> Tensor | None:
    """The plain frozen weight on which all layers are adapters; None if they are not."""
    first = layers[0]
    if not isinstance(first, LoraLayer):
        return None
    for layer in layers:
        if type(layer) is not type(first) or layer.merged or not layer.enabled:
            return None
        base, own = first.base_layer, layer.base_layer
        if own.weight is not base.weight or own.bias is not base.bias:
            return None
        if layer._plain_weight() is None:
            return None
    return first._plain_weight()


class _StackedLinear(torch.autograd.Function):
    """`fused_linear` for rows of several slots. N: the rows of x, M those of a slot."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: list[tuple[float, float]],
        parts: list[tuple[int, slice]],
        randomness: Callable[[int], AbstractContextManager[Any]],
        *matrices: Tensor,
    ) -> Tensor:
        low = [matrix.to(rows.dtype) for matrix in matrices]
        output = F.linear(rows, weight, bias)
        downs, masks = [], []
        for index, ((slot, part), (scaling, dropout)) in enumerate(
            zip(parts, settings, strict=True)
        ):
            a, b = low[2 * index : 2 * index + 2]
            with randomness(slot) if dropout > 0.0 else nullcontext():
                down, mask = _down(rows[part], a, scaling, dropout)
            output[part].addmm_(down, b.t())
            downs.append(down)
            masks.append(mask)
        ctx.save_for_backward(rows, weight, *low, *downs, *masks)
        ctx.parts, ctx.settings = parts, settings
        ctx.types = [matrix.dtype for matrix in matrices]
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *saved = ctx.saved_tensors
        count = len(ctx.parts)
        low, downs, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        wants = ctx.needs_input_grad[6:]
        grad_x = torch.mm(grad_rows, weight) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for index, ((_, part), (scaling, dropout)) in enumerate(
            zip(ctx.parts, ctx.settings, strict=True)
        ):
            a, b = low[2 * index : 2 * index + 2]
            grads += _low_rank_backward(
                grad_rows[part],
                rows[part],
                masks[index],
                a,
                b,
                downs[index],
                scaling=scaling,
                dropout=dropout,
                add_to=None if grad_x is None else grad_x[part],
                wants=(wants[2 * index], wants[2 * index + 1]),
            )
        typed = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, ctx.types, strict=True)
        ]
        return grad_x, None, None, None, None, None, *typed


def stacked_model(models: dict[int, nn.Module], stack: Stack) -> nn.Module:
    """A model for stacked batches, of which all that is frozen is the first slot's own.

    Args:
        models: the slots' models by slot: of one shape, with the same frozen tensors, each with an
            adapter of its own.
        stack: whose rows a batch holds.
    """
    first = next(iter(models.values()))
    tensors = [*first.parameters(), *first.buffers()]
    own = {name for model in models.values() for name in _own_layers(model)}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    stacked = copy.deepcopy(first, memo)
    for name in own:
        layers = {slot: model.get_submodule(name) for slot, model in models.items()}
        parent, _, leaf = name.rpartition(".")
        setattr(stacked.get_submodule(parent), leaf, StackedLayer(layers, stack))
    return stacked


def _own_layers(model: nn.Module) -> list[str]:
    """Modules that a slot cannot share: LoRA layers, and those with parameters that are trained."""
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{other}.") for other in found):
            continue
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, LoraLayer) or trained:
            found.append(name)
    return found
