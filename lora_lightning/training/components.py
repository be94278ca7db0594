"""The module and the data module of a run, built from its settings."""

from __future__ import annotations

from typing import Any

from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.config.groups import Settings
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.models.model_config import load_model_config, max_positions
from lora_lightning.models.tokenizer import embedding_rows, load_tokenizer
from lora_lightning.tasks import Task

from .module import LoraModule
from .warm_start import check_same_loftq, check_same_tokens, task_state_of


def build_components(
    settings: Settings, task: Task, *, seed: int, start_from: str | None = None
) -> tuple[LoraModule, LoraDataModule]:
    """Build the module and the data module of a run, which share task and tokenizer.

    Args:
        settings: Settings of the run.
        task: Task of the run.
        seed: Seed of the run.
        start_from: Adapter folder or checkpoint for a warm start. Defaults to None.

    Raises:
        UserError: If the settings do not suit the model or the warm start.
    """
    if start_from is not None:
        _check_start(start_from, settings)
    tokenizer = load_tokenizer(settings.model)
    model_config = load_model_config(settings.model)
    task.prepare(model_config)
    if start_from is not None:
        task.begin_with(task_state_of(start_from), start_from)
    data = LoraDataModule(
        task,
        tokenizer,
        settings.data,
        length_limit=max_positions(model_config),
        rows=None if settings.model.new_tokens else embedding_rows(model_config),
        seed=seed,
    )
    module = LoraModule(
        task,
        settings.model,
        settings.lora,
        settings.optim,
        seed=seed,
        tokenizer=tokenizer,
        start_from=start_from,
        data=data,
    )
    return module, data


def _check_start(source: str, settings: Settings) -> None:
    """Raise UserError if the adapter for a warm start is damaged or fits another base."""
    if source.endswith(".ckpt"):
        return  # a checkpoint is checked when it is read
    earlier: dict[str, Any] = {}
    folder = AdapterFolder(source)
    if folder.sidecar.is_file():
        sidecar = folder.read_sidecar()
        folder.check_files()
        earlier = sidecar["settings"]
        check_same_tokens(source, earlier["model"], settings.model)
    check_same_loftq(source, earlier, settings.model, settings.lora)
