"""Choice of the LoRA layer for a module, and its construction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .dora import DoraConv1D, DoraEmbedding, DoraLayer, DoraLinear
from .embedding import LoraEmbedding
from .fused_qkv import SplitConv1D, SplitLinear
from .linear import LoraConv1D, LoraLinear
from .lora_layer import LoraLayer
from .parameter import LoraParameter

if TYPE_CHECKING:
    from lora_lightning.lora.config import LoraConfig
    from lora_lightning.lora.target_modules import Match

_DORA: dict[type[LoraLayer], type[DoraLayer]] = {
    LoraLinear: DoraLinear,
    LoraConv1D: DoraConv1D,
    LoraEmbedding: DoraEmbedding,
}


def lora_class_for(module: nn.Module) -> type[LoraLayer] | None:
    """Return the plain LoRA layer class that can wrap `module`, or None."""
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return LoraConv1D
    if isinstance(module, LoraLayer) or next(module.children(), None) is not None:
        return None
    if isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        # nn.Bilinear has in1_features, so only layers shaped like nn.Linear pass.
        return LoraLinear
    return None


def build_layer(module: nn.Module, match: Match, config: LoraConfig) -> LoraLayer:
    """Return the LoRA layer around a module.

    Args:
        module: the module of the match, or a LoRA layer already on another of its parameters.
        match: what to adapt.
        config: the adapter's settings.
    """
    settings: dict[str, Any] = {
        "scaling": match.scaling,
        **{name: getattr(config, name) for name in ("dropout", "init", "freeze_A")},
    }
    if match.parameter is not None:
        return LoraParameter(module, match.rank, parameter=match.parameter, **settings)
    layer_class = lora_class_for(module)
    assert layer_class is not None
    if match.parts is not None:
        split = SplitConv1D if layer_class is LoraConv1D else SplitLinear
        return split(module, match.rank, parts=match.parts, **settings)
    if config.use_dora:
        layer_class = _DORA[layer_class]
    return layer_class(module, match.rank, **settings)
