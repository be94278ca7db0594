"""One backward pass under FSDP2, against the same in one process: python -m torch.distributed.run.

    fsdp2_step.py MODEL [checkpoint]

Each rank has rows of its own; FSDP2 takes the mean of the ranks' gradients.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from lora_lightning.data.collate import PaddingCollator
from lora_lightning.lora import Adapter, LoraConfig, layer
from lora_lightning.tasks import build_task


def adapted(folder: str, *, checkpointing: bool) -> tuple[torch.nn.Module, Adapter]:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(0)
    adapter = Adapter(model, LoraConfig(rank=4))
    for one in adapter.layers.values():
        one.lora_B.data.normal_(std=0.1)
    return model, adapter


def batch(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for length in (9 + rank, 5):
        ids = torch.randint(4, 40, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return PaddingCollator(0)(rows)


def main(folder: str, *, checkpointing: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    task = build_task({"name": "summarization"})
    calls = []
    fused = layer.fused_linear
    layer.fused_linear = lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs)

    model, adapter = adapted(folder, checkpointing=checkpointing)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    task.loss(model, batch(rank)).total.backward()
    times = 2 if checkpointing else 1
    assert len(calls) == times * len(adapter.layers), "the fused step was not taken"
    found = {name: tensor.grad.full_tensor() for name, tensor in adapter.named_tensors().items()}

    model, adapter = adapted(folder, checkpointing=False)
    for other in range(2):
        (task.loss(model, batch(other)).total / 2).backward()
    for name, tensor in adapter.named_tensors().items():
        assert tensor.grad.any(), name
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], checkpointing="checkpoint" in sys.argv)
