"""Fine-tune language models with LoRA under PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.datamodule import LoraDataModule
    from .inference import load_trained
    from .lora import Adapter, LoraConfig, UserError, load_adapter, save_adapter
    from .module import LoraModule
    from .settings import DataConfig, ModelConfig, OptimConfig, SentimentConfig
    from .tasks import SentimentTask

__version__ = "0.1.0"

_HOME = {
    "Adapter": "lora",
    "DataConfig": "settings",
    "LoraConfig": "lora",
    "LoraDataModule": "data.datamodule",
    "LoraModule": "module",
    "ModelConfig": "settings",
    "OptimConfig": "settings",
    "SentimentConfig": "settings",
    "SentimentTask": "tasks",
    "UserError": "lora",
    "load_adapter": "lora",
    "load_trained": "inference",
    "save_adapter": "lora",
}

__all__ = [
    "Adapter",
    "DataConfig",
    "LoraConfig",
    "LoraDataModule",
    "LoraModule",
    "ModelConfig",
    "OptimConfig",
    "SentimentConfig",
    "SentimentTask",
    "UserError",
    "load_adapter",
    "load_trained",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # Lightning and torch take seconds to import, so each name is fetched when it is first used.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
