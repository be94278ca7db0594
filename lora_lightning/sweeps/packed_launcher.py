"""Launcher that trains jobs together if they differ only in their adapter and its training."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import UserError

from .launcher import ProcessLauncher
from .queue import Job, Work

OWN = ("lora", "optim", "tags", "output_dir", "test_before", "logger", "hydra")
"""Parts of the config in which the jobs of a pack may differ."""


class PackedLauncher(ProcessLauncher):
    """Launcher that runs the jobs of a sweep in packs.

    A pack is one process whose jobs share one frozen base. Its jobs have the same model, task,
    data, trainer and seed, so they see the same batches. They may differ in all of `lora` and
    `optim`. A job that fits into no pack gets its own process, as with the process launcher.

    Args:
        max_slots: maximum number of jobs in a pack.
        memory: GiB that a pack may take. An estimate decides how many of its jobs train at a time.
            "auto": 90 % of a GPU, no limit on a CPU.
        settings: settings of the process launcher; `jobs` counts packs here.
    """

    __module__ = "hydra_plugins.lora_lightning"

    def __init__(self, max_slots: int = 16, memory: Any = "auto", **settings: Any) -> None:
        number = isinstance(memory, (int, float)) and not isinstance(memory, bool) and memory > 0
        if memory != "auto" and not number:
            raise UserError(
                f"launcher.memory must be a number of GiB above 0, or auto, got {memory!r}."
            )
        if not isinstance(max_slots, int) or isinstance(max_slots, bool) or max_slots < 1:
            raise UserError(
                f"launcher.max_slots must be a whole number, 1 or more, got {max_slots!r}."
            )
        super().__init__(**settings)
        self.max_slots = max_slots
        self.options = () if memory == "auto" else ("--memory", str(memory))

    def divide(self, planned: list[tuple[Job, DictConfig]]) -> list[Work]:
        """Group jobs that can share a base into packs, and print which cannot."""
        groups: dict[str, list[Job]] = {}
        reasons: dict[str, list[int]] = {}
        for job, config in planned:
            reason = cannot_share(config)
            if reason is None:
                groups.setdefault(_shared_part(config), []).append(job)
            else:
                groups[str(job.folder)] = [job]
                reasons.setdefault(reason, []).append(job.number)
        work = [
            Work(jobs[start : start + self.max_slots], self.options)
            for jobs in groups.values()
            for start in range(0, len(jobs), self.max_slots)
        ]
        for item in work:
            if len(item.jobs) > 1:
                print(f"a pack: jobs {', '.join(str(job.number) for job in item.jobs)}")
        for reason, numbers in reasons.items():
            print(f"not packed, because of {reason}: {', '.join(map(str, numbers))}")
        return work


def cannot_share(config: DictConfig) -> str | None:
    """Return why a job cannot train with others on one frozen base; None if it can."""
    if config.lora.method != "lora":
        return f"lora.method={config.lora.method}, which trains the base itself"
    alone = {
        "lora.target_parameters, whose experts mix rows": config.lora.target_parameters,
        "lora.init=eva, which looks at the data with the base alone": config.lora.init == "eva",
    }
    for reason, holds in alone.items():
        if holds:
            return reason
    devices = str(config.trainer.get("devices", "auto"))
    if devices not in ("auto", "1") or int(config.trainer.get("num_nodes", 1)) > 1:
        return f"trainer.devices={devices}: a pack has one device"
    if not isinstance(config.trainer.get("strategy", "auto"), str):
        return "trainer.strategy: a pack has one device, which holds all of the base"
    for key in ("compile", "gradient_checkpointing", "offload_activations", "quantization"):
        if config.model.get(key):
            return f"model.{key}"
    return None


def _shared_part(config: DictConfig) -> str:
    """Return a hash of the common config of a pack: model, task, data, trainer, seed."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    for key in OWN:
        plain.pop(key, None)
    plain["trainer"].pop("gradient_clip_val", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
