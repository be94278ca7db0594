"""Trains with overrides from the command line, on a model with a layer that nothing calls.

The layer is trained in full fine-tuning, or gets LoRA if the overrides target it.
"""

from __future__ import annotations

import sys

import torch

from lora_lightning.config.compose import compose_config
from lora_lightning.tasks.classification import ClassificationTask
from lora_lightning.training.run import train

build = ClassificationTask.build_model


def build_with_spare_part(self, *args, **kwargs):
    model, head = build(self, *args, **kwargs)
    model.bert.spare = torch.nn.Linear(2, 2)
    return model, head


ClassificationTask.build_model = build_with_spare_part
train(compose_config(sys.argv[1:]))
