"""Loading of a frozen base that is sharded over the ranks.

transformers shards the base while it reads the file, so no rank ever holds all of it. Two methods
can be combined:

* FSDP2 gathers each layer when its turn comes (Zhao et al. 2023, arXiv:2304.11277).
* Tensor parallelism shards the rows and columns of the layers' matrices (Shoeybi et al. 2019,
  arXiv:1909.08053).

`adapter_sharding` describes where the adapter is then stored.

Only this file and `parallel_dims` use DTensor.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lora_lightning.lora import UserError

from .parallel_dims import ParallelDims, full_tensor

# Plan for encoders that transformers has no plan for. Names are relative to the backbone, and the
# styles are transformers' own.
_BERT = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
TENSOR_PLANS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT)
"""Tensor-parallel style of each layer's matrices, by model_type."""


def loading_options(
    auto_class: Any,
    model_config: Any,
    shards: ParallelDims | None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the from_pretrained arguments that shard a base while it loads.

    Raises:
        UserError: If this transformers cannot shard, or has no plan for the model.
    """
    if shards is None or shards.data * shards.tensor == 1:
        return {}
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        DistributedConfig(fsdp_size=1)
    except (ImportError, TypeError):
        raise UserError(
            "transformers: a sharded base requires 5.23 or later. Install it: "
            "pip install 'transformers>=5.23'."
        ) from None
    check_accelerator(shards.mesh.device_type)
    with torch.device("meta"):
        skeleton = auto_class.from_config(model_config, trust_remote_code=trust_remote_code)
    check_heads(model_config, shards.tensor)
    plans: dict[str, Any] = {}
    if shards.data > 1:
        plans["fsdp_plan"] = dict.fromkeys(_repeated_layers(skeleton), "free_full_weight")
    if shards.tensor > 1 and not skeleton.tp_plan:
        plan = TENSOR_PLANS.get(getattr(model_config, "model_type", ""))
        if plan is None:
            raise UserError(
                f"trainer=tp: is not supported with a {type(skeleton).__name__}, which "
                "has no plan. Use trainer=fsdp2 or trainer=ddp."
            )
        prefix = skeleton.base_model_prefix
        plans["tp_plan"] = {f"{prefix}.{name}": style for name, style in plan.items()}
    config = DistributedConfig(fsdp_size=shards.data, tp_size=shards.tensor, **plans)
    return {"distributed_config": config}


def check_accelerator(device_type: str) -> None:
    """Raise UserError if ranks run on another device type than transformers shards on."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type != device_type:
        raise UserError(
            f"trainer.accelerator={device_type}: must be {accelerator.type}, this machine's "
            "accelerator, for a sharded base. To rehearse on a CPU, hide the accelerator: "
            'CUDA_VISIBLE_DEVICES="" lora-lightning ...'
        )


@contextmanager
def local_rank_in_environment(local_rank: int) -> Iterator[None]:
    """Set LOCAL_RANK, from which transformers takes its device while it shards a model.

    srun sets only SLURM_LOCALID. Without LOCAL_RANK, every task of a node uses the first GPU.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def check_heads(model_config: Any, tensor: int) -> None:
    """Raise UserError if the attention heads cannot be sharded evenly."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text or model_config, key, None)
        if isinstance(heads, int) and heads % tensor:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size={tensor}: must divide the model's {key}, "
                f"{heads}. Give another size, or use trainer=fsdp2 or trainer=ddp."
            )


def _repeated_layers(model: nn.Module) -> list[str]:
    """Return the names of the repeated layers, with * in place of their numbers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = model.named_modules()
    found = [name for name, module in named if isinstance(module, GradientCheckpointingLayer)]
    return list(dict.fromkeys(map(with_wildcards, found)))


def with_wildcards(name: str) -> str:
    """Return a name with each number replaced by *, as in sharding plans."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def take_whole(model: nn.Module, name: str, *, reinitialize: bool) -> None:
    """Replace a module with a copy in plain CPU tensors, the same on every rank.

    Args:
        model: Model that is sharded or on a GPU.
        name: Name of the module.
        reinitialize: Whether to draw its initial values again. The CPU's generator draws them, so
            they are the same on any device and with any number of ranks.

    Raises:
        UserError: If the module is a separate FSDP2 unit, like the head of a language model.
    """
    from torch.distributed.fsdp import FSDPModule

    module = model.get_submodule(name)
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise UserError(
            f"lora.modules_to_save={name}: is not supported with a sharded module. Adapt it "
            "with lora.targets, or use trainer=ddp."
        )
    tensors = [*module.parameters(), *module.buffers()]
    memo = {
        id(tensor): _same_kind(tensor, full_tensor(tensor).detach().cpu().clone())
        for tensor in tensors
    }
    plain = copy.deepcopy(module, memo)
    if reinitialize:

        def draw(part: nn.Module) -> None:
            part._is_hf_initialized = False  # type: ignore[assignment]
            for tensor in part.parameters(recurse=False):
                tensor._is_hf_initialized = False  # type: ignore[attr-defined]
            model._init_weights(part)  # type: ignore[operator]

        plain.apply(draw)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, plain)


def _same_kind(original: Tensor, plain: Tensor) -> Tensor:
    if isinstance(original, nn.Parameter):
        return nn.Parameter(plain, requires_grad=original.requires_grad)
    return plain


@contextmanager
def gathered(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Gather a part of a model, to call it outside the model's own forward pass.

    If other ranks hold shards of the layers (FSDP2), all ranks must enter the block.
    The part's weights are gathered once. On exit, weights that were sharded before are resharded.
    FSDP2's hooks are disabled within the block. Otherwise they drop the weights after each call
    and count the call as a pass of the model.
    """
    from torch.distributed.fsdp import FSDPModule

    shares = {id(tensor) for tensor in module.parameters() if isinstance(tensor, DTensor)}
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    owners = [
        unit for unit in units if shares & {id(p) for p in unit.parameters(recurse=False)}
    ] or [unit for unit in units if unit is model and shares]
    for unit in owners:
        unit.unshard()
    hooks = [
        (registered, dict(registered))
        for part in module.modules()
        for registered in (part._forward_pre_hooks, part._forward_hooks)
    ]
    for registered, _ in hooks:
        for number, hook in list(registered.items()):
            if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                del registered[number]
    try:
        yield
    finally:
        for registered, before in hooks:
            registered.clear()
            registered.update(before)
        for unit in owners:
            unit.reshard()
