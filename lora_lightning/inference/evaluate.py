"""Evaluation of a trained adapter, with its saved settings and the changes of this call."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_lightning.adapters.folder import read_sidecar
from lora_lightning.config.compose import over_saved, settings_of
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.distributed.precision import with_precision
from lora_lightning.distributed.tf32 import tf32_matmuls
from lora_lightning.lora import UserError
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.models.loading import load_model_config, max_positions
from lora_lightning.training.trainer import build_trainer
from lora_lightning.utils.quiet import quiet_libraries

from .predictor import Predictor, load_trained


def evaluate(folder: Path, config: DictConfig) -> dict[str, Any]:
    """Return the metrics of an adapter on the test split of the config's data.

    If a test file is given, no other data is read, because an adapter's user may lack the training
    data.

    Raises:
        UserError: the adapter or the data is wrong, or there is no test data.
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
    module = load_trained(folder, model=_as_model_settings(config), device=device)
    task = module.task
    task.config = type(task.config)(**settings.task)
    own = settings.data
    if own.test is not None:
        own = replace(own, train=None, val=None, path=None)
    data = LoraDataModule(
        task,
        module.tokenizer,
        own,
        length_limit=max_positions(load_model_config(module.model_config)),
        rows=vocabulary_rows(module.model),
    )
    with tf32_matmuls(config.trainer.precision, str(config.trainer.accelerator)):
        found = trainer.test(module, data, verbose=False)
    if not found:
        raise UserError("there is no test data: give data.test=FILE.")
    return {name: round(float(value), 6) for name, value in found[0].items()} | {
        "rows": len(data.encoded["test"])
    }


def predictor_for(folder: Path, overrides: list[str]) -> Predictor:
    """Return a predictor with an adapter's saved settings, changed by overrides."""
    config = over_saved(read_sidecar(folder)["settings"], overrides)
    quiet_libraries()
    settings = settings_of(config)
    module = load_trained(folder, model=_as_model_settings(config))
    module.task.config = type(module.task.config)(**settings.task)
    batch_size = settings.data.eval_batch_size or 2 * settings.data.batch_size
    return Predictor(module, batch_size=batch_size, max_length=settings.data.max_length)


def model_changes(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the base model's settings, as saved with an adapter and changed by overrides."""
    return _as_model_settings(over_saved(read_sidecar(folder)["settings"], overrides))


def _as_model_settings(config: DictConfig) -> dict[str, Any]:
    return asdict(settings_of(config).model)
