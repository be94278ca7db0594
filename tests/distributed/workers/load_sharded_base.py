"""Anonymous memory that loading a base in shares takes: python -m torch.distributed.run.

    load_sharded_base.py MODEL TENSOR_SIZE

Prints, by rank, the MiB at the peak above those before; pages of the file itself are not counted.
Then the modules that FSDP2 gathers each when its turn comes.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.parallel_dims import DATA, TENSOR, ParallelDims
from lora_lightning.models.loading import load_generator
from lora_lightning.models.tokenizer import load_tokenizer


def anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**10


def main(folder: str, tensor: int) -> None:
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // tensor, tensor), mesh_dim_names=(DATA, TENSOR))
    config = ModelConfig(name_or_path=folder, dtype="bfloat16")  # a copy: not the file's own pages
    tokenizer = load_tokenizer(config)
    shards = ParallelDims(mesh) if world > 1 else None
    before = peak = anonymous()
    done = False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model = load_generator(config, tokenizer, shards)
    done = True
    watcher.join()
    held = max(peak, anonymous()) - before
    found: list[float] = [0.0] * world
    dist.all_gather_object(found, held)
    if dist.get_rank() == 0:
        print("MiB", *(round(value, 1) for value in found))
        units = (name for name, module in model.named_modules() if isinstance(module, FSDPModule))
        print("units", *(name or "whole" for name in units))
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
