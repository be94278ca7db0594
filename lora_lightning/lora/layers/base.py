"""Base class of the wrappers that put trainable parameters beside a frozen layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Wrapper(nn.Module):
    """Wrapper that calls a frozen base layer and can temporarily replace its weight.

    Attributes that a wrapper lacks (`weight`, `in_features`, ...) come from the base layer, because
    model code reads them.

    Args:
        base_layer: the layer, or another wrapper of it.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        # In a tuple, so that nn.Module does not register the parameter a second time.
        self._pristine_weight: tuple[nn.Parameter] | None = None

    @property
    def adapted(self) -> tuple[nn.Module, str]:
        """The module that holds the adapted weight, and the weight's name in it."""
        return self.base_layer, "weight"

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight currently contains the trained values."""
        return self._pristine_weight is not None

    def replace_weight(self, merged: nn.Parameter) -> None:
        """Replace the base layer's weight, and keep the original untouched."""
        self._pristine_weight = (getattr(*self.adapted),)
        setattr(*self.adapted, merged)

    def unmerge(self) -> None:
        """Restore W0, the identical tensor."""
        if self._pristine_weight is not None:
            setattr(*self.adapted, self._pristine_weight[0])
            self._pristine_weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the kept original weight too.

        `to` and similar methods call this.
        """
        if self._pristine_weight is not None:
            aside = nn.Module()
            aside.weight = self._pristine_weight[0]
            aside._apply(fn)
            self._pristine_weight = (aside.weight,)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # Same lookup as nn.Module.__getattr__, since calling that method takes twice as long.
        for kind in ("_parameters", "_modules", "_buffers"):
            values = self.__dict__.get(kind, ())
            if name in values:
                return values[name]
        if name == "base_layer":
            raise AttributeError(f"{type(self).__name__} has no base layer yet")
        base = self.base_layer
        while isinstance(base, Wrapper):
            base = base.base_layer
        return getattr(base, name)


def dequantized(layer: nn.Module) -> Tensor:
    """Return a layer's weight in floating point, whatever its storage format."""
    weight: Any = layer.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        state: Any = layer.state  # the first pass moves the scales here
        scales = state.SCB if weight.SCB is None else weight.SCB
        return int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
    if hasattr(layer, "dequantized"):
        return layer.dequantized()  # type: ignore[no-any-return, operator]
    return weight.detach()  # type: ignore[no-any-return]
