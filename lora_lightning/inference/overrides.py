"""Settings saved with an adapter, changed by the overrides of predict, evaluate, chat or merge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.config.compose import over_saved, settings_of
from lora_lightning.config.groups import Schema
from lora_lightning.lora import UserError

_GROUPS = {
    "predict": ("model", "task", "data"),
    "predict text=": ("model", "task", "data"),
    "chat": ("model", "task", "data"),
    "evaluate": ("model", "task", "data", "trainer"),
    "merge": ("model",),
}
"""Groups of settings that a verb reads."""
_ALWAYS_UNUSED = r"model\.(tokenizer|gradient_checkpointing|offload_activations|compile)"
_ALWAYS_UNUSED += r"|task\.(labels|monitor|mode)"
_ONLY_FOR_TARGETS = r"task\.(label_column|target_column|generate_rows|text_metrics|blocks)"
_ONLY_FOR_FILES = r"task\.\w+_column|data\.(eval_)?batch_size"
_ONLY_FOR_ROWS = r"data\.(?!batch_size|eval_batch_size|max_length)"
_ONLY_FOR_TRAINING = (
    r"data\.(limit_train|limit_val|packing)|trainer\.(max_\w+|min_\w+|limit_train_batches|"
    r"limit_val_batches|limit_predict_batches|overfit_batches|val_check_interval|"
    r"check_val_every_n_epoch|num_sanity_val_steps|log_every_n_steps|accumulate_grad_batches|"
    r"gradient_clip_\w+|enable_\w+|reload_dataloaders_every_n_epochs)"
)
_UNUSED = {
    "predict": [_ONLY_FOR_TARGETS, _ONLY_FOR_ROWS],
    "predict text=": [_ONLY_FOR_TARGETS, _ONLY_FOR_ROWS, _ONLY_FOR_FILES],
    "chat": [_ONLY_FOR_TARGETS, _ONLY_FOR_ROWS, _ONLY_FOR_FILES],
    "evaluate": [_ONLY_FOR_TRAINING],
    "merge": [],
}
"""Patterns of settings within these groups that a verb does not read."""


def changed_config(folder: str | Path, overrides: Sequence[str], *, verb: str) -> DictConfig:
    """Return the config saved with an adapter, changed by the overrides of a verb.

    Args:
        folder: Adapter folder.
        overrides: Overrides in Hydra's grammar.
        verb: One of predict, "predict text=", chat, evaluate and merge.

    Raises:
        UserError: The folder is damaged, or an override is wrong or has no effect.
    """
    config = over_saved(AdapterFolder(folder).read_sidecar()["settings"], list(overrides))
    check_effect(overrides, verb=verb)
    return config


def changed_model(folder: str | Path, overrides: Sequence[str], *, verb: str) -> dict[str, Any]:
    """Return the settings of the base model, as `changed_config` does."""
    return model_settings(changed_config(folder, overrides, verb=verb))


def model_settings(config: DictConfig) -> dict[str, Any]:
    """Return the settings of the base model in a config as plain values."""
    return vars(settings_of(config).model)


def check_effect(overrides: Sequence[str], *, verb: str) -> None:
    """Raise UserError for overrides that change nothing in a verb.

    Args:
        overrides: Overrides in Hydra's grammar. Presets of several groups always pass.
        verb: See `changed_config`.
    """
    groups = {field.name for field in fields(Schema)}
    unused = re.compile("|".join([_ALWAYS_UNUSED, *_UNUSED[verb]]))
    idle = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        group = re.split("[.@]", key)[0]
        if group in groups and (group not in _GROUPS[verb] or unused.match(key)):
            idle.append(override)
    if not idle:
        return
    leave = "Leave it out" if len(idle) == 1 else "Leave them out"
    columns = any(re.match(r"task\.\w+_column", item.lstrip("+")) for item in idle)
    file = ", or read a column of a file: input=FILE" if verb == "predict text=" and columns else ""
    raise UserError(f"{', '.join(idle)}: no effect on {verb}. {leave}{file}.")
