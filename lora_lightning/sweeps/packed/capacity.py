"""Number of runs that fit into memory."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_lightning.config.compose import settings_of
from lora_lightning.config.saved import read_config
from lora_lightning.distributed.precision import with_precision
from lora_lightning.tasks import build_task
from lora_lightning.training.components import build_components
from lora_lightning.training.preflight.memory import Memory
from lora_lightning.utils.memory import peak_memory_mib
from lora_lightning.utils.quiet import quiet_libraries
from lora_lightning.utils.run_folder import RunFolder

from .pack import device_of

SLOT_BYTES = 50 * 2**20
"""Memory of a run on a CPU besides its tensors: Trainer, loggers, view of the data."""


def slots_at_a_time(folders: list[Path], gib: float | None) -> int:
    """Return how many of these runs can train together; the highest rank stands for all.

    Args:
        folders: Folders of the runs.
        gib: Memory that they may take; None: 90 % of a GPU, no limit on a CPU.
    """
    configs = [read_config(RunFolder(folder).config) for folder in folders]
    device = device_of(configs[0])
    if gib is None and device.type == "cuda":
        gib = 0.9 * torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib is None or len(folders) == 1:
        return len(folders)
    quiet_libraries()
    config = with_precision(max(configs, key=lambda config: int(config.lora.rank)))
    settings = settings_of(config)
    module, data = build_components(settings, build_task(settings.task), seed=config.seed)
    data.setup("fit")
    module.configure_model()
    memory = Memory(module.to(device), data, settings, device)
    process_bytes = 0
    if device.type == "cpu":  # libraries and the data take memory there too
        process_bytes = int(peak_memory_mib(device) * 2**20) - memory.frozen

    def required(count: int) -> int:
        slots = count * SLOT_BYTES if device.type == "cpu" else 0
        return process_bytes + sum(memory.parts(count).values()) + slots

    limit = gib * 2**30
    fitting = next((count for count in range(len(folders), 0, -1) if required(count) <= limit), 0)
    print(f"{max(fitting, 1)} of {len(folders)} runs train at a time, within {gib:.1f} GiB.")
    if fitting == 0:
        print(f"WARNING: launcher.memory: one run requires about {required(1) / 2**30:.1f} GiB.")
    return max(fitting, 1)
