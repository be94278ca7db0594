"""Launcher that trains jobs together if they differ only in their adapter and its training.

Experimental: see the package `packed`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import UserError

from .grouping import group_by
from .job import Job
from .job_process import Work
from .launcher import ProcessLauncher, is_integer

OWN = ("lora", "optim", "tags", "output_dir", "test_before", "logger", "hydra")
"""Parts of the config in which the jobs of a pack may differ."""


class PackedLauncher(ProcessLauncher):
    """Launcher that runs the jobs of a sweep in packs.

    Experimental. A pack is one process whose jobs share one frozen base. Its jobs have the same
    model, task, data, trainer and seed, so they see the same batches. They may differ in all of
    `lora` and `optim`. A job that fits into no pack gets its own process, as with the process
    launcher.

    Args:
        max_slots: Maximum number of jobs in a pack. 16 by default.
        memory: GiB that a pack may take. An estimate decides how many of its jobs train at a time.
            "auto" by default: 90 % of a GPU, no limit on a CPU.
        settings: Settings of the process launcher; `jobs` counts packs here.
    """

    __module__ = "hydra_plugins.lora_lightning"

    def __init__(self, max_slots: int = 16, memory: Any = "auto", **settings: Any) -> None:
        number = isinstance(memory, (int, float)) and not isinstance(memory, bool) and memory > 0
        if memory != "auto" and not number:
            raise UserError(f"launcher.memory={memory!r}: must be auto or a number of GiB above 0.")
        if not is_integer(max_slots, 1):
            raise UserError(f"launcher.max_slots={max_slots!r}: must be a positive integer.")
        super().__init__(**settings)
        self.max_slots = max_slots
        self.options = () if memory == "auto" else ("--memory", str(memory))

    def divide(self, jobs: list[Job]) -> list[Work]:
        """Group jobs that can share a base into packs, and print which cannot."""
        reasons = {job.number: reason_against_packing(job.config) for job in jobs}
        packs = group_by(
            jobs,
            lambda job: str(job.folder) if reasons[job.number] else _shared_part(job.config),
        )
        work = [
            Work(pack[start : start + self.max_slots], self.options)
            for pack in packs.values()
            for start in range(0, len(pack), self.max_slots)
        ]
        for item in work:
            if len(item.jobs) > 1:
                print(f"pack of jobs {_numbers(item.jobs)}")
        alone = [job for job in jobs if reasons[job.number]]
        for reason, group in group_by(alone, lambda job: reasons[job.number]).items():
            print(f"not packed: jobs {_numbers(group)}, because of {reason}")
        return work


def _numbers(jobs: list[Job]) -> str:
    return ", ".join(str(job.number) for job in jobs)


def reason_against_packing(config: DictConfig) -> str | None:
    """Return why a job cannot train with others on one frozen base; None if it can."""
    lora, trainer, model = config.lora, config.trainer, config.model
    devices = str(trainer.get("devices", "auto"))
    several = devices not in ("auto", "1") or int(trainer.get("num_nodes", 1)) > 1
    options = ("compile", "gradient_checkpointing", "offload_activations", "quantization")
    reasons = {
        f"lora.method={lora.method}, which trains the base itself": lora.method != "lora",
        "lora.target_parameters, because experts mix the rows of a batch": lora.target_parameters,
        "lora.init=eva, which runs the base alone": lora.init == "eva",
        f"trainer.devices={devices}: a pack has one device": several,
        "trainer.strategy: a pack has one device, with the whole base": not isinstance(
            trainer.get("strategy", "auto"), str
        ),
        **{f"model.{key}": model.get(key) for key in options},
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _shared_part(config: DictConfig) -> str:
    """Return a hash of the common config of a pack: model, task, data, trainer, seed."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    for key in OWN:
        plain.pop(key, None)
    plain["trainer"].pop("gradient_clip_val", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
