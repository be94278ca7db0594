"""The loss over a head that is gathered from two processes: python -m torch.distributed.run.

    sharded_lm_head.py CASE=MODEL ...

Prints as JSON, by case and rank, the most rows of logits that were made at a time, and losses and
gradients beside those of the same rows and the whole model in one process. The case "adapted" has
LoRA on the head; in "dropped" the head is no longer whole after the forward pass.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.parallel_dims import DATA, TENSOR, ParallelDims
from lora_lightning.lora import Adapter, LoraConfig
from lora_lightning.models import lm_head as head
from lora_lightning.models.loading import load_generator
from lora_lightning.models.tokenizer import load_tokenizer

ROWS = 4
"""Of logits, at a time."""


class Logits(TorchDispatchMode):
    """Notes the most rows of any product whose rows have the vocabulary's size."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        product = function.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        if product and result.shape[-1] == self.vocabulary:
            self.most = max(self.most, result.shape[:-1].numel())
        return result


def losses(
    folder: str, case: str, shards: ParallelDims | None, rank: int
) -> tuple[int, list[float]]:
    """Rows of logits at a time; losses of two steps and of an evaluation, and gradients."""
    config = ModelConfig(name_or_path=folder)
    model = load_generator(config, load_tokenizer(config), shards).eval()
    targets = ["q_proj", "c_attn", *(["lm_head"] if case == "adapted" else [])]
    targets = [name for name in targets if any(n.endswith(name) for n, _ in model.named_modules())]
    adapter = Adapter(model, LoraConfig(rank=2, targets=targets))
    generator = torch.Generator().manual_seed(5)
    for layer in adapter.layers.values():
        for matrix in (layer.lora_A, layer.lora_B):
            matrix.data.normal_(std=0.1, generator=generator)
    if case == "dropped" and shards is not None:
        unit = model.get_output_embeddings()
        assert isinstance(unit, FSDPModule)
        unit.set_reshard_after_forward(True)
    vocabulary = model.config.vocab_size
    found = []
    with Logits(vocabulary) as logits:
        for step in range(3):
            ids = torch.randint(3, vocabulary, (2, 11), generator=generator.manual_seed(step))
            places = torch.arange(20 if rank == 0 else 3)  # more than ROWS, or fewer
            wanted = ids.flatten()[places]
            with torch.set_grad_enabled(step < 2):
                total, correct = head.loss_at(model, {"input_ids": ids}, places, wanted)
            found += [float(total), float(correct)]
            if step < 2:
                total.backward()
    return logits.most, found + [
        float(value)
        for layer in adapter.layers.values()
        for matrix in (layer.lora_A, layer.lora_B)
        for value in matrix.grad.flatten()
    ]


def main(cases: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=(DATA, TENSOR))
    found: dict[str, Any] = {}
    for case, _, folder in (argument.partition("=") for argument in cases):
        head.CHUNK = 2**25
        _, expected = losses(folder, case, None, rank)
        head.CHUNK = ROWS * len(load_tokenizer(ModelConfig(name_or_path=folder)))
        most, ours = losses(folder, case, ParallelDims(mesh), rank)
        found[case] = [None] * world
        dist.all_gather_object(found[case], (most, ours, expected))
    if rank == 0:
        print("FOUND", json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
