"""EVA initialization from the training rows, before training starts."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import nn

from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.config.untrusted import arguments_from_file
from lora_lightning.lora import LoraConfig, UserError
from lora_lightning.lora.initialization.eva import EvaResult, run_eva
from lora_lightning.lora.serialization.load import read_adapter
from lora_lightning.lora.serialization.peft_config import from_peft_config
from lora_lightning.tasks import Task, to_device

from .checkpointing import read_checkpoint

LAYERS = ("targets", "exclude", "layers", "layers_pattern")
RANKS = ("rank", "alpha", "alpha_ratio", "scale", "rank_pattern", "alpha_pattern", "use_rslora")


def find_start(
    task: Task,
    model: nn.Module,
    config: LoraConfig,
    data: Any,
    trainer: L.Trainer | None,
    *,
    earlier: str = "",
) -> EvaResult:
    """Return EVA's settings and matrices for an adapter, or the settings of an earlier run.

    Args:
        task: Task whose loss runs the model.
        model: Model without the adapter.
        config: Adapter settings.
        data: A LoraDataModule that is set up. None selects the Trainer's.
        trainer: Trainer whose ranks get the same result, or None.
        earlier: Checkpoint or adapter of an earlier run, whose values replace the initial ones.
            Defaults to "".

    Raises:
        UserError: If there are no training rows, or the earlier run's file is damaged.
    """
    if earlier:
        return EvaResult(earlier_settings(earlier, config), {})
    if trainer is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return eva_start(task, model, config, data, device)
    data = data or getattr(trainer, "datamodule", None)
    device, shows = trainer.strategy.root_device, trainer.is_global_zero
    start = eva_start(task, model, config, data, device, shows_progress=shows)
    broadcast: EvaResult = trainer.strategy.broadcast(start)  # the last bits may differ by device
    return broadcast


def eva_start(
    task: Task,
    model: nn.Module,
    config: LoraConfig,
    data: Any,
    device: torch.device,
    *,
    shows_progress: bool = True,
) -> EvaResult:
    """Run EVA on the training rows, and leave the model on the device.

    Args:
        task: Task whose loss runs the model.
        model: Model without the adapter.
        config: Adapter settings.
        data: A LoraDataModule that is set up.
        device: Device to run the model on.
        shows_progress: Whether to show the progress. Defaults to True.

    Raises:
        UserError: If there are no training rows.
    """
    if data is None or not data.has("train"):
        raise UserError("lora.init=eva requires training rows: give data.train.")
    from tqdm import tqdm

    model.to(device).eval()
    hidden = None if shows_progress else True
    bar = tqdm(desc="EVA: layers settled", file=sys.stderr, disable=hidden, leave=False)

    def update_bar(settled: int, layers: int) -> None:
        bar.total = layers
        bar.update(settled - bar.n)

    both = getattr(task, "encoder_decoder", False)
    batches = (
        to_device(_with_distinct_width(batch) if both else batch, device)
        for batch in data.training_batches(device.type)
    )
    with bar:
        start = run_eva(
            model, config, batches, lambda batch: task.loss(model, batch), show=update_bar
        )
    model.train()
    return EvaResult(start.config, {name: a.cpu() for name, a in start.matrices.items()})


def earlier_settings(source: str, config: LoraConfig) -> LoraConfig:
    """Return adapter settings with the layers, ranks and alphas that EVA found earlier.

    Args:
        source: A checkpoint or an adapter of the earlier run.
        config: All other settings of the adapter.

    Raises:
        UserError: If the checkpoint or the adapter is damaged.
    """
    if source.endswith(".ckpt"):
        saved = arguments_from_file(read_checkpoint(source).get("hyper_parameters", {}), source)
        before = LoraConfig(**saved.get("lora") or {})
    else:
        raw, _ = read_adapter(source)
        AdapterFolder(source).check_files()
        before = from_peft_config(raw)
    return replace(
        config,
        init="kaiming",
        **{name: getattr(before, name) for name in (*LAYERS, *RANKS)},
    )


def _with_distinct_width(batch: dict[str, Any]) -> dict[str, Any]:
    """Pad labels to another width than inputs, to distinguish encoder and decoder."""
    if batch["labels"].shape != batch["input_ids"].shape:
        return batch
    return {**batch, "labels": nn.functional.pad(batch["labels"], (0, 1), value=-100)}
