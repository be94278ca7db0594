"""LoRA on linear layers: nn.Linear, quantized linear layers and transformers' Conv1D."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.lora.probe import IN_OUT, layout_of

from .lora_layer import LoraLayer


class LoraLinear(LoraLayer):
    """LoRA on nn.Linear, or on any quantized linear layer with in_features and out_features.

    A is (r, in), B is (out, r).
    """

    adds_product = True

    def __init__(self, base_layer: nn.Module, rank: int, **settings: Any) -> None:
        self.layout = layout_of(base_layer)  # first, since A and B may start from the weight
        super().__init__(base_layer, rank, **settings)

    def _relayout(self, matrix: Tensor) -> Tensor:
        if self.layout is None:
            raise UserError(
                f"a {type(self.base_layer).__name__} does not compute weight times input. Use it "
                "unmerged, with lora.use_dora=false and lora.init=kaiming."
            )
        return matrix.t() if self.layout == IN_OUT else matrix

    def plain_weight(self) -> Tensor | None:
        base = self.base_layer
        return base.weight if _is_plain(base, nn.Linear) else None  # type: ignore[return-value]


class LoraConv1D(LoraLayer):
    """LoRA on transformers' Conv1D (GPT-2), a linear layer whose weight is (in, out)."""

    adds_product = True

    def features(self) -> tuple[int, int]:
        assert isinstance(self.base_layer.weight, Tensor)
        fan_in, fan_out = self.base_layer.weight.shape
        return fan_in, fan_out

    def plain_weight(self) -> Tensor | None:
        base = self.base_layer
        return base.weight.t() if _is_plain(base, type(base)) else None  # type: ignore[operator]

    def _relayout(self, matrix: Tensor) -> Tensor:
        return matrix.t()


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer is exactly of this class, unhooked, with frozen nn.Parameters."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is not kind or hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    for parameter in layer._parameters.values():
        plain = parameter is None or type(parameter) is nn.Parameter
        if not plain or (parameter is not None and parameter.requires_grad):
            return False
    return True
