"""LoRA in pure torch: layers, matching, merging, and PEFT's file format."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter
    from .config import LoraConfig
    from .errors import UserError
    from .layer import LoraConv1D, LoraEmbedding, LoraLayer, LoraLinear
    from .several import AdapterSet
    from .state import load_adapter, read_adapter, save_adapter
    from .summary import Summary
    from .vocabulary import grow

_HOME = {
    "Adapter": "adapter",
    "AdapterSet": "several",
    "LoraConfig": "config",
    "LoraConv1D": "layer",
    "LoraEmbedding": "layer",
    "LoraLayer": "layer",
    "LoraLinear": "layer",
    "Summary": "summary",
    "UserError": "errors",
    "grow": "vocabulary",
    "load_adapter": "state",
    "read_adapter": "state",
    "save_adapter": "state",
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
    # torch is imported with the first name that needs it: settings and messages need none.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
