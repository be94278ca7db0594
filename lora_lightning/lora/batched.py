"""Several adapters side by side on one frozen model, each with its own rows of a shared batch.

The rows of a stacked batch belong to slots, in the order of the slots. Each slot has equally many
rows unless counts are given. A frozen layer is computed once for all slots. The layers of a slot,
above all A and B, see only the rows of that slot. They compute the same products as the slot
would on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .batched_functional import GroupedLinear, StackedLinear
from .casts import cast_frozen
from .layers.base import Wrapper
from .layers.lora_layer import LoraLayer
from .layers.parameter import LoraParameter
from .products import joins_products
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
                f"a layer of this model mixes rows: it gets {rows} for {sum(counts)} of several "
                "adapters. Use one adapter at a time, in a sweep with hydra/launcher=process."
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
        linear = GroupedLinear if grouped else StackedLinear
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
                "adapters with lora.target_parameters cannot share a batch, since experts mix its "
                "rows. Use one adapter at a time: model = adapters[NAME]."
            )
    first = next(iter(models.values()))
    tensors = [*first.parameters(), *first.buffers()]
    unshared = {name for model in models.values() for name in unshared_layers(model)}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    stacked = copy.deepcopy(first, memo)
    for name in unshared:
        layers = {slot: model.get_submodule(name) for slot, model in models.items()}
        parent, _, leaf = name.rpartition(".")
        setattr(stacked.get_submodule(parent), leaf, StackedLayer(layers, stack))
    return stacked


def unshared_layers(model: nn.Module) -> list[str]:
    """Return the names of modules that a slot cannot share.

    These are LoRA layers, other modules with trainable parameters, and modules with running
    statistics.
    """
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{other}.") for other in names):
            continue
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, Wrapper) or trained or keeps_statistics(module):
            names.append(name)
    return names
