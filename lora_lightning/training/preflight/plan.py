"""Cost estimates of training from a model's config.json alone, before any weight is loaded."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from lora_lightning.config.compose import settings_of
from lora_lightning.distributed.precision import with_precision
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.serialization.peft_folder import weights_bytes
from lora_lightning.lora.target_modules import match_targets
from lora_lightning.lora.target_presets import target_sets
from lora_lightning.models.fake import skeletons
from lora_lightning.models.loading import load_model_config
from lora_lightning.tasks import build_task
from lora_lightning.utils.quiet import quiet_libraries

from .dry_run import (
    MOST_ROWS,
    PARTS,
    Rehearsal,
    most_rows,
    rehearsal,
    total,
)

RANKS = (4, 8, 16, 64)
SHARE = 0.9
"""Share of a device's memory that a plan uses; the rest is for allocators and kernels."""
MIB, GIB = 2**20, 2**30
MEMBERSHIP = Path("/proc/self/cgroup")
"""Lists the control groups of this process."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""


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
            "model.quantization=int8: plan knows nf4. What int8 takes is told by lora-lightning "
            "check, on the weights."
        )
    if config.model.get("new_tokens"):
        raise UserError("model.new_tokens: plan does not count their rows. Leave it out here.")
    device = _device(config)
    available = free_bytes(device) if device_gib is None else int(device_gib * GIB)
    at_hand = f"{'GPU' if device.type == 'cuda' else 'CPU'} at hand, of which this is free"
    return "\n\n".join(
        [
            _adapters(config),
            _memory(config, device, int(SHARE * available)),
            f"Fits: within nine tenths of {available / GIB:.1f} GiB "
            f"({at_hand if device_gib is None else 'device_gib'}). Counted are tensors, at the "
            "moment of a step when there are most; parts that come later or are gone by then are "
            "0. Transient is what the backward pass or the optimizer holds in passing. Interpreter "
            "and libraries come on top, and a few per cent that allocators and kernels take.",
            *_of_this_cpu(config, device, asked=device_gib is not None),
        ]
    )


def _of_this_cpu(config: DictConfig, device: torch.device, *, asked: bool) -> list[str]:
    """Note which "auto" settings resolved for this CPU when the plan is for another device."""
    automatic = [
        f"{key}={value}"
        for key, own, value in (
            ("trainer.precision", config.trainer.precision, "bf16-true"),
            ("data.max_tokens", config.data.max_tokens, "null"),
        )
        if own == "auto"
    ]
    if not automatic or not asked or device.type == "cuda":
        return []
    return [
        f"NOTE This is what the settings come to on this CPU. For a GPU add {' '.join(automatic)}."
    ]


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


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or of this machine within its container's limit.

    Raises:
        UserError: If the operating system does not report it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    found += _left_in_groups()
    if not found:
        with suppress(AttributeError, ValueError, OSError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if not found:
        raise UserError("this system does not tell how much memory is free: give device_gib=16.")
    return min(found)


def _left_in_groups() -> list[int]:
    """Return the bytes left by each memory limit of this process's cgroups, innermost first.

    A SLURM job has its own cgroup below the root. A container sees its own cgroup as the root.
    Cached files count as free, because the system drops them when memory runs short.
    """
    left = []
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # cgroup version 2
                root, names = CGROUPS, ("max", "current")
            elif "memory" in controllers.split(","):
                root, names = CGROUPS / "memory", ("limit_in_bytes", "usage_in_bytes")
            else:
                continue
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if not group.is_relative_to(root):
                    break
                with suppress(OSError, ValueError):  # no such file, or "max" for no limit
                    limit, used = (int((group / f"memory.{name}").read_text()) for name in names)
                    stat = (group / "memory.stat").read_text().split()
                    cached = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                    left.append(limit - used + cached.get("inactive_file", 0))
    return left


def _device(config: DictConfig) -> torch.device:
    gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")


def _adapters(config: DictConfig) -> str:
    """Tabulate trainable parameters and file size by target set and rank."""
    settings = settings_of(methods(config)["LoRA"])
    assert settings.lora is not None
    task = build_task(settings.task)
    task.prepare(load_model_config(settings.model))
    task.suppose()
    with skeletons(torch.device("meta")):
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
    asked = "full" if config.lora.method == "full" else "LoRA"
    asked = "QLoRA" if config.model.quantization else asked
    lines: list[str] = []
    told: list[str] = []
    bar = tqdm(methods(config).items(), file=sys.stderr, disable=None, leave=False)
    for name, variant in bar:
        bar.set_description(f"a step of {name}")
        try:
            with rehearsal(variant, device) as rehearsed:
                rows = int(variant.data.batch_size)
                parts = rehearsed.step(rows)
                batch = _largest(rehearsed, limit, rows)
        except UserError as error:
            if name == asked:
                raise
            told.append(f"{name}: {error}")
            continue
        if not lines:
            lines = _head(variant, rehearsed)
        sizes = " ".join(f"{parts[part] / MIB:>11,.1f}" for part in PARTS)
        fits = "yes" if total(parts) <= limit else "no"
        lines.append(
            f"{name:<6} {variant.trainer.precision:<10} {sizes} {total(parts) / MIB:>11,.1f} "
            f"{fits:>5} {batch:>7}"
        )
    return "\n".join([*lines, *told])


def _head(config: DictConfig, rehearsed: Rehearsal) -> list[str]:
    rows = f"{config.data.batch_size} rows of {rehearsed.length} tokens"
    if rehearsed.at_a_time is not None and rehearsed.at_a_time < config.data.batch_size:
        rows += f", {rehearsed.at_a_time} computed at a time (data.max_tokens)"
    columns = " ".join(f"{part:>11}" for part in (*PARTS, "total"))
    return [
        f"Memory of a step in MiB: {rows}, lora.rank={config.lora.rank}, {config.optim.name}",
        "",
        f"{'method':<6} {'precision':<10} {columns} {'fits':>5} {'batch':>7}",
    ]


def _largest(rehearsed: Rehearsal, limit: int, rows: int) -> str:
    """Format the largest batch that fits."""
    most = rehearsed.at_a_time
    if most is not None and total(rehearsed.step(most + 1)) <= limit:
        return "any"
    found = most_rows(lambda rows: total(rehearsed.step(rows)), limit, min(rows, most or rows))
    return "any" if found >= MOST_ROWS else str(found) if found else "none"
