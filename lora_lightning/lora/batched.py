"""Several adapters side by side on one frozen model, each with its own rows of a shared batch.

The rows of a stacked batch belong to slots, in the order of the slots. Each slot has equally many
rows unless counts are given. A frozen layer is computed once for all slots. The layers of a slot,
above all A and B, see only the rows of that slot. They compute the same products as the slot
would on its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .casts import cast_frozen
from .functional import (
    _down,
    _low_rank_backward,
    joins_products,
    refuse_second_derivatives,
)
from .layers.base import Wrapper
from .layers.lora_layer import LoraLayer
from .layers.parameter import LoraParameter
from .running_statistics import keeps_statistics


@dataclass
class Stack:
    """The slots whose rows the current batch holds."""

    slots: list[int] = field(default_factory=list)
    """Slot numbers, in the order of their rows."""
    counts: list[int] = field(default_factory=list)
    """Rows of each slot. If empty, all slots have equally many."""
    randomness: Callable[[int], AbstractContextManager[Any]] = lambda slot: nullcontext()
    """Enters the random state of a slot, so that draws inside belong to the slot."""

    @contextmanager
    def of(self, slots: list[int], counts: list[int] | None = None) -> Iterator[None]:
        """Set the slots whose rows the batch holds, within the block."""
        self.slots, self.counts = slots, counts or []
        try:
            yield
        finally:
            self.slots, self.counts = [], []

    def parts(self, rows: int, *, inner: int = 1) -> Iterator[tuple[int, slice]]:
        """Yield each slot with the slice of its rows.

        Each of the `rows` counts `inner` times in the slice, once by default.

        Raises:
            UserError: the rows do not divide among the slots, because the model has changed their
                order or number.
        """
        if len(self.slots) == 1:
            yield self.slots[0], slice(0, rows * inner)
            return
        counts = self.counts or [1] * len(self.slots)
        each, rest = divmod(rows, sum(counts))
        if rest:
            raise UserError(
                f"a layer of this model sees {rows} rows of {sum(counts)} that stacked adapters "
                "share, so it mixes rows, and they cannot go through it together: one adapter at a "
                "time, in a sweep with hydra/launcher=process."
            )
        start = 0
        for slot, count in zip(self.slots, counts, strict=True):
            stop = start + count * each * inner
            yield slot, slice(start, stop)
            start = stop


class StackedLayer(nn.Module):
    """One layer per slot, either adapted or trained whole.

    If all are LoRA layers on one plain weight, h = W0 x is computed once for all rows. Each slot's
    s B A x is then added to its own rows. Otherwise each slot's layer is called with its rows.

    Args:
        layers: the slots' layers, by slot.
        stack: the slots whose rows the batch holds.
    """

    def __init__(self, layers: dict[int, nn.Module], stack: Stack) -> None:
        super().__init__()
        self._layers = layers  # not registered, since they belong to the slots' models
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
        # By the first dimension. A tensor with one row for all (positions) has no slot.
        inner = rows.shape[0] // max(x.shape[0], 1)
        parts = list(self._stack.parts(x.shape[0], inner=inner))
        matrices = [matrix for layer in layers for matrix in layer.matrices()]  # type: ignore[operator]
        grouped = joins_products(x.device) and not self._stack.counts
        linear = _GroupedLinear if grouped else _StackedLinear
        output: Tensor = linear.apply(
            rows,
            cast_frozen(weight, dtype),
            None if bias is None else bias.to(dtype),
            [(layer.scaling, layer.active_dropout()) for layer in layers],  # type: ignore[operator]
            parts,
            self._stack.randomness,
            *matrices,
        )
        return output.view(*x.shape[:-1], weight.shape[0])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Model code reads attributes of a layer such as `weight` and `in_features`.
            return getattr(next(iter(self.__dict__["_layers"].values())), name)


def _common_weight(layers: list[nn.Module]) -> Tensor | None:
    """Return the plain frozen weight that all layers adapt, or None if there is none."""
    first = layers[0]
    if not isinstance(first, LoraLayer) or not first.adds_product:  # DoRA does more than add
        return None
    for layer in layers:
        if type(layer) is not type(first) or layer.merged or not layer.enabled:
            return None
        base, other = first.base_layer, layer.base_layer
        if other.weight is not base.weight or other.bias is not base.bias:
            return None
        if layer.plain_weight() is None:
            return None
    return first.plain_weight()


class _StackedLinear(torch.autograd.Function):
    """`fused_linear` for rows of several slots. x has N rows, and a slot has M of them."""

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
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a stacked batch of adapters", "take one adapter at a time")
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
                types=(ctx.types[2 * index], ctx.types[2 * index + 1]),
            )
        return grad_x, None, None, None, None, None, *grads


class _GroupedLinear(torch.autograd.Function):
    """`_StackedLinear` with one batched product for all slots, padded to the highest rank.

    There are K slots with M rows each, and R is the highest rank. The padding is zeros. The sums
    are the same, but the last bits may differ.
    """

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
        count = len(parts)
        x = rows.view(count, -1, rows.shape[-1])  # (K, M, in)
        a = _padded(matrices[0::2], x.dtype)  # (K, R, in)
        b = _padded([matrix.t() for matrix in matrices[1::2]], x.dtype)  # (K, R, out)
        scales = _column(tuple(scaling for scaling, _ in settings), x.dtype, x.device)
        keep = _keep(x, settings, parts, randomness)
        down = torch.bmm(x if keep is None else x * keep, a.mT).mul_(scales)  # (K, M, R)
        output = F.linear(rows, weight, bias)
        output.view(count, -1, output.shape[-1]).baddbmm_(down, b)
        ctx.save_for_backward(rows, weight, a, b, down, scales, keep)
        ctx.ranks = [matrix.shape[0] for matrix in matrices[0::2]]
        ctx.types = [matrix.dtype for matrix in matrices]
        return output

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a stacked batch of adapters", "take one adapter at a time")
        rows, weight, a, b, down, scales, keep = ctx.saved_tensors
        count = len(ctx.ranks)
        x = rows.view(count, -1, rows.shape[-1])
        grad = grad_rows.reshape(count, -1, grad_rows.shape[-1])
        up = torch.bmm(grad, b.mT).mul_(scales)  # (K, M, R)
        grad_a = torch.bmm(up.mT, x if keep is None else x * keep)  # (K, R, in)
        grad_b = torch.bmm(grad.mT, down)  # (K, out, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_rows, weight)
            wide = grad_x.view(x.shape)
            if keep is None:
                wide.baddbmm_(up, a)
            else:
                wide.addcmul_(torch.bmm(up, a), keep)
        grad_a, grad_b = grad_a.to(ctx.types[0]), grad_b.to(ctx.types[1])  # one cast for all slots
        grads: list[Tensor] = []
        for index, rank in enumerate(ctx.ranks):
            grads += [grad_a[index, :rank], grad_b[index, :, :rank]]
        typed = [
            grad.to(dtype) if wanted else None
            for grad, dtype, wanted in zip(grads, ctx.types, ctx.needs_input_grad[6:], strict=True)
        ]
        return grad_x, None, None, None, None, None, *typed


def _padded(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices (r, width) as one tensor (K, R, width), padded with rows of zeros."""
    first = matrices[0]
    ranks = [matrix.shape[0] for matrix in matrices]
    shape = (len(matrices), max(ranks), first.shape[1])
    make = torch.empty if min(ranks) == max(ranks) else torch.zeros
    padded = make(shape, dtype=dtype, device=first.device)
    torch._foreach_copy_([padded[i, :rank] for i, rank in enumerate(ranks)], [*matrices])
    return padded


@functools.lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor (K, 1, 1).

    The result is cached because each copy to a GPU forces a wait.
    """
    # Evaluation may call first, and training saves the tensor for backward.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def _keep(
    x: Tensor,
    settings: list[tuple[float, float]],
    parts: list[tuple[int, slice]],
    randomness: Callable[[int], AbstractContextManager[Any]],
) -> Tensor | None:
    """Return the dropout factors of the inputs, drawn from each slot's own generator."""
    if not any(dropout > 0.0 for _, dropout in settings):
        return None
    keep = torch.ones_like(x)
    for place, (_, dropout), (slot, _) in zip(keep, settings, parts, strict=True):
        if dropout > 0.0:
            with randomness(slot):
                place.copy_(torch.native_dropout(place, dropout, True)[0])
    return keep


def stacked_model(models: dict[int, nn.Module], stack: Stack) -> nn.Module:
    """Return a model for stacked batches that shares the frozen tensors of the first slot.

    Args:
        models: the slots' models by slot. All have one shape, the same frozen tensors and an
            adapter of their own.
        stack: the slots whose rows the batch holds.

    Raises:
        UserError: an adapter is on parameters, whose modules may mix rows.
    """
    for model in models.values():
        if any(isinstance(module, LoraParameter) for module in model.modules()):
            raise UserError(
                "adapters on parameters (target_parameters) cannot share a batch: their rows go "
                "to experts, all together. One adapter at a time: model = adapters[NAME]."
            )
    first = next(iter(models.values()))
    tensors = [*first.parameters(), *first.buffers()]
    own = {name for model in models.values() for name in own_layers(model)}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    stacked = copy.deepcopy(first, memo)
    for name in own:
        layers = {slot: model.get_submodule(name) for slot, model in models.items()}
        parent, _, leaf = name.rpartition(".")
        setattr(stacked.get_submodule(parent), leaf, StackedLayer(layers, stack))
    return stacked


def own_layers(model: nn.Module) -> list[str]:
    """Return the names of modules that a slot cannot share.

    These are LoRA layers, other modules with trainable parameters, and modules with running
    statistics.
    """
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{other}.") for other in found):
            continue
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, Wrapper) or trained or keeps_statistics(module):
            found.append(name)
    return found
