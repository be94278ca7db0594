"""LoRA in pure torch: layers, matching, merging, and PEFT's file format."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.errors import UserError

    from .config import LoraConfig
    from .embeddings import grow
    from .layers.embedding import LoraEmbedding
    from .layers.linear import LoraConv1D, LoraLinear
    from .layers.lora_layer import LoraLayer
    from .model import Adapter
    from .multi_adapter import AdapterSet
    from .serialization.load import load_adapter, read_adapter
    from .serialization.save import save_adapter
    from .summary import Summary

_HOME = {
    "Adapter": "model",
    "AdapterSet": "multi_adapter",
    "LoraConfig": "config",
    "LoraConv1D": "layers.linear",
    "LoraEmbedding": "layers.embedding",
    "LoraLayer": "layers.lora_layer",
    "LoraLinear": "layers.linear",
    "Summary": "summary",
    "UserError": ".errors",
    "grow": "embeddings",
    "load_adapter": "serialization.load",
    "read_adapter": "serialization.load",
    "save_adapter": "serialization.save",
}

__all__ = [
    "Adapter",
    "AdapterSet",
    "LoraConfig",
    "LoraConv1D",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "Summary",
    "UserError",
    "grow",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # The first name that needs torch imports it. Settings and messages do not need it.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
