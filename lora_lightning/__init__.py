"""Fine-tune language models with LoRA under PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lightning.config.schema import DataConfig as DataConfig
    from lora_lightning.config.schema import ModelConfig as ModelConfig
    from lora_lightning.config.schema import OptimConfig as OptimConfig
    from lora_lightning.config.tasks import ClassificationConfig as ClassificationConfig
    from lora_lightning.config.tasks import SentimentConfig as SentimentConfig
    from lora_lightning.data.datamodule import LoraDataModule as LoraDataModule
    from lora_lightning.distributed.strategies import DataParallelStrategy as DataParallelStrategy
    from lora_lightning.distributed.strategies import OneDeviceStrategy as OneDeviceStrategy
    from lora_lightning.inference.loading import load_trained as load_trained
    from lora_lightning.inference.predictor import Predictor as Predictor
    from lora_lightning.lora import Adapter as Adapter
    from lora_lightning.lora import AdapterSet as AdapterSet
    from lora_lightning.lora import LoraConfig as LoraConfig
    from lora_lightning.lora import UserError as UserError
    from lora_lightning.lora import load_adapter as load_adapter
    from lora_lightning.lora import save_adapter as save_adapter
    from lora_lightning.models.resolve import resolve as resolve
    from lora_lightning.models.tokenizer import load_tokenizer as load_tokenizer
    from lora_lightning.tasks import ClassificationTask as ClassificationTask
    from lora_lightning.tasks import SentimentTask as SentimentTask
    from lora_lightning.training.module import LoraModule as LoraModule

__version__ = "0.1.0"

_HOME = {
    "Adapter": "lora",
    "AdapterSet": "lora",
    "ClassificationConfig": "config.tasks",
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
    "SentimentConfig": "config.tasks",
    "SentimentTask": "tasks",
    "UserError": "lora",
    "load_adapter": "lora",
    "load_tokenizer": "models.tokenizer",
    "load_trained": "inference.loading",
    "resolve": "models.resolve",
    "save_adapter": "lora",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    # Lightning and torch take seconds to import, so each name is imported on first use.
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
