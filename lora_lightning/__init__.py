"""Fine-tune language models with LoRA under PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.config.schema import (
        ClassificationConfig,
        DataConfig,
        ModelConfig,
        OptimConfig,
        SentimentConfig,
    )
    from lora_lightning.data.datamodule import LoraDataModule
    from lora_lightning.distributed.strategies import DataParallelStrategy, OneDeviceStrategy
    from lora_lightning.inference.loading import load_trained
    from lora_lightning.inference.predictor import Predictor
    from lora_lightning.lora import (
        Adapter,
        AdapterSet,
        LoraConfig,
        UserError,
        load_adapter,
        save_adapter,
    )
    from lora_lightning.models.resolve import resolve
    from lora_lightning.models.tokenizer import load_tokenizer
    from lora_lightning.tasks import ClassificationTask, SentimentTask
    from lora_lightning.training.module import LoraModule

__version__ = "0.1.0"

_HOME = {
    "Adapter": "lora",
    "AdapterSet": "lora",
    "ClassificationConfig": "config.schema",
    "ClassificationTask": "tasks",
    "DataConfig": "config.schema",
    "DataParallelStrategy": "distributed.strategies",
    "LoraConfig": "lora",
    "LoraDataModule": "data.datamodule",
    "LoraModule": "training.module",
    "ModelConfig": "config.schema",
    "OneDeviceStrategy": "distributed.strategies",
    "OptimConfig": "config.schema",
    "Predictor": "inference.predictor",
    "SentimentConfig": "config.schema",
    "SentimentTask": "tasks",
    "UserError": "lora",
    "load_adapter": "lora",
    "load_tokenizer": "models.tokenizer",
    "load_trained": "inference.loading",
    "resolve": "models.resolve",
    "save_adapter": "lora",
}

__all__ = [
    "Adapter",
    "AdapterSet",
    "ClassificationConfig",
    "ClassificationTask",
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
    # Lightning and torch take seconds to import, so each name is imported on first use.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
