"""A frozen layer with something trained beside it: what all kinds of that have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Wrapper(nn.Module):
    """Calls a frozen base layer, whose weight it may replace for a while.

    Attributes that a wrapper lacks (`weight`, `in_features`, ...) are the base layer's, because
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
        """The module that holds the adapted weight, and its name there."""
        return self.base_layer, "weight"

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight holds what is trained at the moment."""
        return self._pristine_weight is not None

    def replace_weight(self, merged: nn.Parameter) -> None:
        """Puts another weight in the place of the base layer's, which is set aside untouched."""
        self._pristine_weight = (getattr(*self.adapted),)
        setattr(*self.adapted, merged)

    def unmerge(self) -> None:
        """Puts W0 back, the very same tensor."""
        if self._pristine_weight is not None:
            setattr(*self.adapted, self._pristine_weight[0])
            self._pristine_weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves or converts the weight that is set aside too: `to` and its like call this."""
        if self._pristine_weight is not None:
            aside = nn.Module()
            aside.weight = self._pristine_weight[0]
            aside._apply(fn)
            self._pristine_weight = (aside.weight,)
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        # What nn.Module's own does, for which a call of it takes twice as long.
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
