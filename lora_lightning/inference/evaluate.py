"""Evaluation of a trained adapter, with its saved settings and the changes of this call."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_lightning.config.compose import settings_of
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.distributed.precision import with_precision
from lora_lightning.distributed.tf32 import tf32_matmuls
from lora_lightning.lora import UserError
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.models.model_config import load_model_config, max_positions
from lora_lightning.training.trainer import build_trainer
from lora_lightning.utils.quiet import quiet_libraries

from .loading import load_trained
from .overrides import model_settings


def evaluate(folder: Path, config: DictConfig) -> dict[str, Any]:
    """Return the metrics of an adapter on the test split of the config's data.

    If a test file is given, no other data is read, because an adapter's user may lack the training
    data.

    Args:
        folder: Adapter folder of a run.
        config: Composed config, see `changed_config`.

    Raises:
        UserError: The adapter or the data is wrong, or there is no test data.
    """
    quiet_libraries()
    config = with_precision(config, trains=False)
    settings = settings_of(config)
    # Use several devices only on request, because each would test only some of the rows.
    free = config.trainer.devices == "auto" and config.trainer.strategy == "auto"
    trainer = build_trainer(
        config,
        logger=False,
        callbacks=[],
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),  # in a file the bar would mix with the JSON
        **({"devices": 1} if free else {}),
    )
    device = trainer.strategy.root_device
    module = load_trained(folder, model=model_settings(config), device=device)
    task = module.task
    task.config = type(task.config)(**settings.task)
    rows = settings.data
    if rows.test is not None:
        rows = replace(rows, train=None, val=None, path=None)
    data = LoraDataModule(
        task,
        module.tokenizer,
        rows,
        length_limit=max_positions(load_model_config(module.model_config)),
        rows=vocabulary_rows(module.model),
    )
    with tf32_matmuls(config.trainer.precision, str(config.trainer.accelerator)):
        metrics = trainer.test(module, data, verbose=False)
    if not metrics:
        raise UserError("no test data. Name a file: data.test=FILE.")
    return {name: round(float(value), 6) for name, value in metrics[0].items()} | {
        "rows": len(data.encoded["test"])
    }
