"""Fine-tune language models with LoRA under PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.datamodule import LoraDataModule
    from .inference import Predictor, load_trained
    from .lora import Adapter, AdapterSet, LoraConfig, UserError, load_adapter, save_adapter
    from .modeling import load_tokenizer, resolve
    from .module import LoraModule
    from .settings import DataConfig, ModelConfig, OptimConfig, SentimentConfig
    from .strategies import DataParallelStrategy, OneDeviceStrategy
    from .tasks import SentimentTask

__version__ = "0.1.0"

_HOME = {
    "Adapter": "lora",
    "AdapterSet": "lora",
    "DataConfig": "settings",
    "DataParallelStrategy": "strategies",
    "LoraConfig": "lora",
    "LoraDataModule": "data.datamodule",
    "LoraModule": "module",
    "ModelConfig": "settings",
    "OneDeviceStrategy": "strategies",
    "OptimConfig": "settings",
    "Predictor": "inference",
    "SentimentConfig": "settings",
    "SentimentTask": "tasks",
    "UserError": "lora",
    "load_adapter": "lora",
    "load_tokenizer": "modeling",
    "load_trained": "inference",
    "resolve": "modeling",
    "save_adapter": "lora",
}

__all__ = [
    "Adapter",
    "AdapterSet",
    "DataConfig",
    "DataParallelStrategy",
    "LoraConfig",
    "LoraDataModule",
    "LoraModule",
    "ModelConfig",
    "OneDeviceStrategy",
    "OptimConfig",
    "Predictor",
    "SentimentConfig",
    "SentimentTask",
    "UserError",
    "load_adapter",
    "load_tokenizer",
    "load_trained",
    "resolve",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    # Lightning and torch take seconds to import, so each name is fetched when it is first used.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
