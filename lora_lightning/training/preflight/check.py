"""Preflight check that shows in seconds what a run does, and rejects runs that fail later."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from lora_lightning.config.compatibility import check_combinations
from lora_lightning.config.compose import settings_of, with_direction
from lora_lightning.config.groups import Settings
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.data.row_counts import class_counts, row_warnings
from lora_lightning.distributed.precision import automatic_precision_message, with_precision
from lora_lightning.distributed.sharded_loading import check_heads
from lora_lightning.distributed.strategies import ShardedStrategy
from lora_lightning.lora import UserError
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.models.forward import check_packing
from lora_lightning.models.model_config import load_model_config
from lora_lightning.models.tokenizer import token_ids
from lora_lightning.tasks import build_task, to_device
from lora_lightning.training.components import build_components
from lora_lightning.training.folder_checks import check_unused_folder
from lora_lightning.training.module import LoraModule
from lora_lightning.training.optim import build_scheduler, check_schedule_metric
from lora_lightning.training.trainer import (
    build_trainer,
    check_accumulation,
    check_validation_interval,
)
from lora_lightning.utils.quiet import quiet_libraries
from lora_lightning.utils.run_folder import RunFolder

from .memory import PROBE_ROWS, Memory


def check(config: DictConfig) -> str:
    """Run a run's setup and one backward pass, without training.

    Returns:
        A report: matched modules, trainable share, a decoded batch, truncation, gradients, memory.

    Raises:
        UserError: If the run would fail later.
    """
    quiet_libraries()
    requested, config = config, with_precision(with_direction(config))
    choices = automatic_precision_message(requested, config)
    settings = settings_of(config)
    output = Path(config.output_dir)
    check_unused_folder(output)
    with RunFolder(output).rollback_on_mistake(always=True):
        task = build_task(settings.task)
        module, data = build_components(settings, task, seed=config.seed, start_from=config.adapter)
        trainer = build_trainer(config)
        check_accumulation(trainer)
        _check_sharded(trainer.strategy, settings, config.adapter)
        data.setup("fit")
        check_validation_interval(trainer, len(data.train_dataloader()))
        check_schedule_metric(
            settings.optim, validates=data.has("val") and trainer.limit_val_batches != 0
        )
        module.configure_model()
        build_scheduler(
            module.build_optimizer(), settings.optim, total_steps=_planned_steps(trainer, data)
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module.to(device)
        if data.packs:
            with trainer.precision_plugin.forward_context():
                check_packing(module.model)
        sections = [
            *([choices] if choices else []),
            f"Model   {settings.model.name_or_path}, {type(module.model).__name__}, "
            f"{next(module.model.parameters()).dtype}".replace("torch.", ""),
            _modules(module),
            *_new_tokens(module, data),
            _data(data, settings),
            _sample(data),
            _gradients(module, data, device),
            _memory(module, data, settings, device),
        ]
    return "\n\n".join([*sections, "All checks passed."])


def _planned_steps(trainer: Any, data: LoraDataModule) -> int | None:
    """Return the run's number of optimizer steps, or None if it is unlimited."""
    batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (limit or 1.0))
    steps = math.inf if trainer.max_epochs == -1 else float(trainer.max_epochs or 1)
    steps *= math.ceil(batches / trainer.accumulate_grad_batches)
    steps = min(steps, math.inf if trainer.max_steps < 0 else trainer.max_steps)
    return int(max(1, steps)) if steps < math.inf else None


def _check_sharded(strategy: object, settings: Settings, adapter: str | None) -> None:
    """Raise UserError for settings that a sharded base does not support.

    The check itself loads the base unsharded.
    """
    if isinstance(strategy, ShardedStrategy):
        check_combinations(settings.model, settings.lora, start_from=adapter, sharded=True)
        check_heads(load_model_config(settings.model), strategy.tensor_size)


def _modules(module: LoraModule) -> str:
    if module.adapter is not None:
        return f"Adapter\n{module.adapter.summary()}"
    count = sum(p.numel() for p in module.model.parameters())
    return f"Full fine-tuning: all {count:,} parameters are trainable."


def _new_tokens(module: LoraModule, data: LoraDataModule) -> list[str]:
    """Report the ids of new tokens and how many training rows contain each."""
    new = module.model_config.new_tokens
    if not new:
        return []
    ids = token_ids(module.tokenizer, new)
    train = data.encoded["train"]
    columns = [train["input_ids"], *([train["labels"]] if module.task.generative else [])]
    counts = Counter(n for row in zip(*columns, strict=True) for n in set().union(*row))
    rows = vocabulary_rows(module.model)
    before = getattr(module.model, "rows_before_growth", rows)
    grown = f"grown from {before:,} rows to {rows:,}" if rows > before else f"{rows:,} rows"
    lines = [f"New tokens, embeddings {grown}"]
    lines += [
        f"  {token!r}, id {number}, in {counts[number]:,} of {len(train):,} training rows"
        for token, number in zip(new, ids, strict=True)
    ]
    lines += [
        f"WARNING no training row has {token!r}, so its embedding row does not train"
        for token, number in zip(new, ids, strict=True)
        if not counts[number]
    ]
    return ["\n".join(lines)]


def _data(data: LoraDataModule, settings: Settings) -> str:
    lines = [
        f"Data    longest input {data.max_length} tokens, batches of {settings.data.batch_size}"
    ]
    for split, rows in data.encoded.items():
        lengths = sorted(rows["length"][:])
        cut = sum(rows["truncated"][:])
        dropped = ""
        if data.dropped[split]:
            dropped = f", {data.dropped[split]} rows dropped ({data.task.dropped_means})"
        lines.append(
            f"{split:<7} {len(rows):>7,} rows, {sum(lengths):>10,} tokens, median "
            f"{lengths[len(lengths) // 2]}, longest {lengths[-1]}, "
            f"{100 * cut / len(rows):.1f} % truncated{dropped}"
        )
    counts = class_counts(data)
    if counts:
        lines.append(f"classes {', '.join(f'{label} {n:,}' for label, n in counts.items())}")
    lines += [f"WARNING {line}" for line in row_warnings(data)]
    return "\n".join(lines)


def _sample(data: LoraDataModule) -> str:
    """Show a training batch: its first rows decoded from their ids, with their targets."""
    loader = data.train_dataloader()
    # The leftover rows form a smaller batch, which may come first.
    batches: Any = loader.batch_sampler
    indices = max(islice(batches, 2), key=len)
    examples = [data.encoded["train"][index] for index in indices]
    rows, width = data.collate(packing=data.packs)(examples)["input_ids"].shape
    lines = [
        f"A training batch, {rows} rows x {width} tokens; its first rows, targets in brackets:"
    ]
    for example in examples[:3]:
        text = data.task.show_example(example, data.tokenizer).replace("\n", "\n  ")
        middle = "" if len(text) <= 320 else " ... "
        padding = width - len(example["input_ids"]) if rows == len(examples) else 0
        lines.append(f"  {text[:160]}{middle}{text[160:][-160:]} (+{padding} padding)")
    return "\n".join(lines)


def _gradients(module: LoraModule, data: LoraDataModule, device: torch.device) -> str:
    """Run one backward pass and report which trainable parameters receive a gradient.

    All-zero A and B get random values first. With B at zero, A's gradient is zero by construction.
    """
    trainable = {n: t for n, t in module.trainable_tensors().items() if t.requires_grad}
    layers = module.adapter.layers.values() if module.adapter is not None else ()
    for layer in layers:
        for matrix in (layer.lora_A, layer.lora_B):
            if not matrix.any():
                nn.init.normal_(matrix, std=0.02)
    batch = to_device(data.longest_batch("train", PROBE_ROWS), device)
    module.train()
    output = module.task.loss(module.model, batch)
    (output.total / output.count).backward()
    if module.adapter is not None:
        module.adapter.check_gradients()
    without = [name for name, tensor in trainable.items() if tensor.grad is None]
    zero = [n for n, t in trainable.items() if t.grad is not None and not t.grad.any()]
    bad = [n for n, t in trainable.items() if t.grad is not None and not t.grad.isfinite().all()]
    module.zero_grad(set_to_none=True)
    if bad:
        raise UserError(
            f"the gradient of {len(bad)} tensors is not finite, such as {bad[0]}: "
            "use model.dtype=bfloat16 or float32."
        )
    note = f", {len(zero)} of them all zero on this batch ({zero[0]})" if zero else ""
    if without:
        return (
            f"Gradients: {len(trainable) - len(without)} of {len(trainable)} trainable tensors "
            f"receive one{note}.\nWARNING this batch gives {len(without)} tensors no gradient "
            f"({without[0]})"
        )
    return f"Gradients: all {len(trainable)} trainable tensors receive one{note}."


def _memory(
    module: LoraModule, data: LoraDataModule, settings: Settings, device: torch.device
) -> str:
    parts = Memory(module, data, settings, device).parts()
    total = sum(parts.values())
    sizes = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
    line = (
        f"Memory: about {total / 2**20:,.1f} MiB of tensors at the longest micro-batch ({sizes}); "
        "libraries and data need more."
    )
    if settings.model.offload_activations and device.type == "cpu":
        line += "\nmodel.offload_activations has no effect: activations are on the CPU already."
    if device.type == "cuda":
        free = torch.cuda.get_device_properties(device).total_memory
        if total > free:
            raise UserError(
                f"{line} The GPU has {free / 2**20:,.1f}. Lower data.batch_size or "
                "data.max_length, or set model.gradient_checkpointing=true."
            )
    return line
