"""Modules of a tiny classifier, and rows and batches for them."""

from __future__ import annotations

import torch

from lora_lightning.config.schema import ModelConfig, OptimConfig
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.lora import LoraConfig
from lora_lightning.tasks import SentimentTask
from lora_lightning.training.module import LoraModule

LABELS = {
    "labels": ["negative", "positive"],
    "text_column": "text",
    "label_column": "label",
}
SGD = OptimConfig(name="SGD", lr=0.05, weight_decay=0.0, scheduler="constant", warmup=0)
LORA = LoraConfig(rank=4, alpha=8)


def make_module(folder, *, lora: LoraConfig | None = LORA, optim=SGD, kind=LoraModule, **model):
    task = SentimentTask()
    task.restore(LABELS)
    module = kind(task, ModelConfig(name_or_path=str(folder), **model), lora, optim, seed=3)
    module.configure_model()
    if module.adapter is not None:  # with B = 0 half of all gradients would be zero
        generator = torch.Generator().manual_seed(5)
        for layer in module.adapter.layers.values():
            layer.lora_B.data.normal_(std=0.1, generator=generator)
    return module


def encoded_rows(count: int, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(4, 40, (length,), generator=generator).tolist(),
            "labels": int(torch.randint(2, (1,), generator=generator)),
        }
        for length in lengths
    ]


def batches_of(rows: list[dict], sizes: list[int]) -> list[dict]:
    assert sum(sizes) == len(rows)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        PaddingCollator(1)(rows[end - size : end]) for end, size in zip(ends, sizes, strict=True)
    ]
