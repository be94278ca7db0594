"""LoftQ: an adapter initialized with the quantization error of its base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers.base import dequantized
from lora_lightning.lora.layers.factory import lora_class_for
from lora_lightning.lora.layers.linear import LoraConv1D
from lora_lightning.lora.model import Adapter

from .svd import principal


def is_quantized(layer: nn.Module, original: nn.Module) -> bool:
    """Return whether a layer has another type than the original layer."""
    return type(layer) is not type(original)


def weight_of(original: nn.Module) -> Tensor:
    """Return a layer's weight before quantization, as (out, in)."""
    weight = dequantized(original)
    return weight.t() if lora_class_for(original) is LoraConv1D else weight


@torch.no_grad()
def initialize_loftq(adapter: Adapter, original: nn.Module) -> None:
    """Initialize each quantized layer with the s B A of rank r that is nearest to W - Q.

    This is the first step of the alternation in Li et al. 2023, arXiv:2310.08659. The next step
    would quantize W - s B A again. No file holds such a base, and no loader makes it. Therefore Q
    stays as its library makes it, and the adapter is plain LoRA on Q.

    Args:
        adapter: adapter on the quantized model.
        original: the model before quantization. Layers that are the same in it keep their usual
            initial values.
    """
    for name, layer in adapter.layers.items():
        before = original.get_submodule(name)
        if not is_quantized(layer.base_layer, before):
            continue
        missing = weight_of(before).to(layer.lora_A) - layer.dense_weight().to(layer.lora_A)
        a, b = principal(missing, layer.rank, scaling=layer.scaling)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)


@torch.no_grad()
def copy_quantized_values(original: nn.Module, quantized: nn.Module) -> None:
    """Copy the values of quantized weights into a model, with or without an adapter on it.

    Args:
        original: the model before quantization. Its weights change.
        quantized: the quantized model without an adapter.
    """
    for name, layer in quantized.named_modules():
        target: Any = original.get_submodule(name)
        target = getattr(target, "base_layer", target)
        if is_quantized(layer, target) and next(layer.children(), None) is None:
            values = dequantized(layer).to(target.weight)
            turned = lora_class_for(target) is LoraConv1D
            target.weight.copy_(values.t() if turned else values)
