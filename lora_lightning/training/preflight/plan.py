"""Cost estimates of training from a model's config.json alone, before any weight is loaded."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from lora_lightning.config.compose import settings_of
from lora_lightning.distributed.precision import with_precision
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.serialization.save import weights_bytes
from lora_lightning.lora.target_modules import match_targets
from lora_lightning.lora.target_presets import target_sets
from lora_lightning.models.fake import fake_models
from lora_lightning.models.model_config import load_model_config
from lora_lightning.tasks import build_task
from lora_lightning.utils.quiet import quiet_libraries

from .dry_run import (
    MOST_ROWS,
    PARTS,
    DryRun,
    dry_run,
    most_rows,
    total,
)
from .free_memory import free_bytes

RANKS = (4, 8, 16, 64)
SHARE = 0.9
"""Share of a device's memory that a plan uses; the rest is for allocators and kernels."""
MIB, GIB = 2**20, 2**30


def plan(config: DictConfig, device_gib: float | None = None) -> str:
    """Report possible adapters and the memory of LoRA, QLoRA and full fine-tuning.

    Args:
        config: A composed config.
        device_gib: Memory of the target device in GiB. Defaults to None, the free memory of the
            device of this machine.

    Raises:
        UserError: If the settings do not fit the model or each other.
    """
    quiet_libraries()
    if config.model.quantization == "int8":
        raise UserError(
            "model.quantization=int8 is not supported by plan, which knows nf4. Use lora-lightning "
            "check, which loads the weights."
        )
    if config.model.get("new_tokens"):
        raise UserError("model.new_tokens is not supported by plan. Leave it out here.")
    device = _device(config)
    available = free_bytes(device) if device_gib is None else int(device_gib * GIB)
    source = f"free on this {'GPU' if device.type == 'cuda' else 'CPU'}"
    return "\n\n".join(
        [
            _adapters(config),
            _memory(config, device, int(SHARE * available)),
            f"Fits: within nine tenths of {available / GIB:.1f} GiB "
            f"({source if device_gib is None else 'device_gib'}). The table counts tensors at the "
            "peak of a step; parts that are freed before it or allocated after it are 0. Transient "
            "is the temporary memory of the backward pass and the optimizer. The interpreter and "
            "libraries need more, and allocators and kernels a few per cent.",
            *_note_cpu_settings(config, device, other_device=device_gib is not None),
        ]
    )


def _note_cpu_settings(
    config: DictConfig, device: torch.device, *, other_device: bool
) -> list[str]:
    """Note which "auto" settings resolved for this CPU when the plan is for another device."""
    automatic = [
        f"{key}={value}"
        for key, own, value in (
            ("trainer.precision", config.trainer.precision, "bf16-true"),
            ("data.max_tokens", config.data.max_tokens, "null"),
        )
        if own == "auto"
    ]
    if not automatic or not other_device or device.type == "cuda":
        return []
    return [f"NOTE These settings were chosen for this CPU. For a GPU add {' '.join(automatic)}."]


def adapter_size(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> tuple[int, int]:
    """Return an adapter's number of trainable parameters and the bytes of its weight file.

    Args:
        model: Model without an adapter, restored on return. Fake tensors suffice as weights.
        config: Config of the adapter.
        strict: Whether a single-module pattern without a match is an error. Defaults to True.
    """
    adapter = Adapter(model, config, strict=strict)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = weights_bytes(adapter.exported_tensors())
    adapter.remove()
    return trained, size


def methods(config: DictConfig) -> dict[str, DictConfig]:
    """Return the config for LoRA, QLoRA and full fine-tuning, each with resolved precision."""
    lora, full = config.copy(), config.copy()
    lora.lora.method, lora.model.quantization = "lora", None
    if lora.lora.init in ("eva", "loftq"):  # they need more than the model and change no size
        lora.lora.init = "kaiming"
    qlora = lora.copy()
    qlora.model.quantization = "nf4"
    full.lora.method, full.model.quantization, full.adapter = "full", None, None
    full.optim.loraplus_lr_ratio = None
    if full.trainer.precision == "bf16-true" or full.model.dtype in ("bfloat16", "float16"):
        full.trainer.precision, full.model.dtype = "bf16-mixed", "auto"  # full needs fp32 weights
    each = {"LoRA": lora, "QLoRA": qlora, "full": full}
    return {name: with_precision(variant) for name, variant in each.items()}


def _device(config: DictConfig) -> torch.device:
    gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")


def _adapters(config: DictConfig) -> str:
    """Tabulate trainable parameters and file size by target set and rank."""
    settings = settings_of(methods(config)["LoRA"])
    assert settings.lora is not None
    task = build_task(settings.task)
    task.prepare(load_model_config(settings.model))
    task.assume_labels()
    with fake_models(torch.device("meta")):
        model, head = task.build_model(settings.model, SimpleNamespace(pad_token_id=0))
        count = sum(parameter.numel() for parameter in model.parameters())
        saved = list(dict.fromkeys([*settings.lora.modules_to_save, *head]))
        chosen = replace(settings.lora, modules_to_save=saved)
        sets = {name: replace(chosen, targets=t) for name, t in target_sets(model).items()}
        if all(chosen.targets != other.targets for other in sets.values()):
            sets = {"as given": chosen, **sets}
        ranks = {*RANKS, chosen.rank}
        if chosen.starts_from_weight:  # the smallest side of any target weight limits the rank
            every: list[Any] = [match.module for match in match_targets(model, chosen)]
            most = min(min(module.weight.shape) for module in every)
            ranks = {rank for rank in ranks if rank <= most or rank == chosen.rank}
        lines = [
            f"{settings.model.name_or_path}: {type(model).__name__}, {count:,} parameters",
            "",
            f"{'adapter':<17} {'rank':>4} {'trained':>13} {'share':>8} {'file, bytes':>14}",
        ]
        for name, lora in sets.items():
            for rank in sorted(ranks):
                as_given = lora.targets == chosen.targets
                sized = replace(lora, rank=rank)
                trained, size = adapter_size(model, sized, strict=as_given)
                share = f"{100 * trained / count:.2f} %"
                setting = f"  lora.targets={_typed(lora.targets)}" if rank == min(ranks) else ""
                lines.append(f"{name:<17} {rank:>4} {trained:>13,} {share:>8} {size:>14,}{setting}")
    return "\n".join(lines)


def _typed(targets: Any) -> str:
    """Format targets as the user would type them."""
    return targets if isinstance(targets, str) else f"[{','.join(targets)}]"


def _memory(config: DictConfig, device: torch.device, limit: int) -> str:
    """Tabulate parts, their sum, whether it fits, and the largest fitting batch by method."""
    requested = "full" if config.lora.method == "full" else "LoRA"
    requested = "QLoRA" if config.model.quantization else requested
    lines: list[str] = []
    failures: list[str] = []
    bar = tqdm(methods(config).items(), file=sys.stderr, disable=None, leave=False)
    for name, variant in bar:
        bar.set_description(f"a step of {name}")
        try:
            with dry_run(variant, device) as run:
                rows = int(variant.data.batch_size)
                parts = run.step(rows)
                batch = _largest(run, limit, rows)
        except UserError as error:
            if name == requested:
                raise
            failures.append(f"{name}: {error}")
            continue
        if not lines:
            lines = _head(variant, run)
        sizes = " ".join(f"{parts[part] / MIB:>11,.1f}" for part in PARTS)
        fits = "yes" if total(parts) <= limit else "no"
        lines.append(
            f"{name:<6} {variant.trainer.precision:<10} {sizes} {total(parts) / MIB:>11,.1f} "
            f"{fits:>5} {batch:>7}"
        )
    return "\n".join([*lines, *failures])


def _head(config: DictConfig, run: DryRun) -> list[str]:
    rows = f"{config.data.batch_size} rows of {run.length} tokens"
    if run.at_a_time is not None and run.at_a_time < config.data.batch_size:
        rows += f", {run.at_a_time} computed at a time (data.max_tokens)"
    columns = " ".join(f"{part:>11}" for part in (*PARTS, "total"))
    return [
        f"Memory of a step in MiB: {rows}, lora.rank={config.lora.rank}, {config.optim.name}",
        "",
        f"{'method':<6} {'precision':<10} {columns} {'fits':>5} {'batch':>7}",
    ]


def _largest(run: DryRun, limit: int, rows: int) -> str:
    """Format the largest batch that fits."""
    most = run.at_a_time
    if most is not None and total(run.step(most + 1)) <= limit:
        return "any"
    largest = most_rows(lambda rows: total(run.step(rows)), limit, min(rows, most or rows))
    return "any" if largest >= MOST_ROWS else str(largest) if largest else "none"
