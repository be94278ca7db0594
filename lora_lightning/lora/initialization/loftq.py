"""LoftQ: an adapter that starts as what quantisation has taken away from its base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.layers.linear import LoraConv1D, dequantized, lora_class_for
from lora_lightning.lora.model import Adapter

from .svd import principal


def is_quantised(layer: nn.Module, original: nn.Module) -> bool:
    """Whether a layer holds another kind of weight than it did before."""
    return type(layer) is not type(original)


def weight_of(original: nn.Module) -> Tensor:
    """The weight of a layer before it was quantised, as (out, in)."""
    weight = dequantized(original)
    return weight.t() if lora_class_for(original) is LoraConv1D else weight


@torch.no_grad()
def make_up(adapter: Adapter, original: nn.Module) -> None:
    """Starts each quantised layer at the s B A of rank r that is nearest to W - Q.

    Li et al. 2023, arXiv:2310.08659, the first step of their alternation. The next would quantise
    W - s B A anew: a base that no file holds and no loader makes, so Q stays as its library makes
    it, and the adapter is plain LoRA on that.

    Args:
        adapter: on the quantised model.
        original: the model as it was before; layers that are the same in it start as ever.
    """
    for name, layer in adapter.layers.items():
        before = original.get_submodule(name)
        if not is_quantised(layer.base_layer, before):
            continue
        missing = weight_of(before).to(layer.lora_A) - layer.dense_weight().to(layer.lora_A)
        a, b = principal(missing, layer.rank, scaling=layer.scaling)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)


@torch.no_grad()
def take_over_values(original: nn.Module, quantised: nn.Module) -> None:
    """Gives a model, with an adapter on it or not, the values that quantised weights stand for.

    Args:
        original: the model before it was quantised; its weights change.
        quantised: the same without an adapter.
    """
    for name, layer in quantised.named_modules():
        target: Any = original.get_submodule(name)
        target = getattr(target, "base_layer", target)
        if is_quantised(layer, target) and next(layer.children(), None) is None:
            values = dequantized(layer).to(target.weight)
            turned = lora_class_for(target) is LoraConv1D
            target.weight.copy_(values.t() if turned else values)
