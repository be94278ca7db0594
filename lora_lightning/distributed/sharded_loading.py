"""A frozen base in shares, one to each process.

transformers shards the base while it reads the file, so that no process ever holds all of it: by
layers that are gathered when their turn comes (FSDP2, Zhao et al. 2023, arXiv:2304.11277), by rows
and columns of their matrices (tensor parallelism, Shoeybi et al. 2019, arXiv:1909.08053), or both.
Where the adapter lies then, `placement` says.

This file alone knows of DTensor.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lora_lightning.lora import UserError

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""Lightning's names of the dimensions of its device mesh."""

# Of encoders that transformers has no plan for; names within the backbone, its own styles.
_BERT = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
TENSOR_PLANS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT)
"""By model_type: how each layer's matrices are cut."""


@dataclass(frozen=True)
class Shards:
    """The processes of a run, as data x tensor: a batch for each row of them.

    Args:
        mesh: Lightning's device mesh, with the dimensions `DATA` and `TENSOR`.
    """

    mesh: DeviceMesh

    @functools.cached_property
    def data(self) -> int:
        """Processes that see different rows; the base's layers are spread over them."""
        return self.mesh[DATA].size()

    @functools.cached_property
    def tensor(self) -> int:
        """Processes that share the matrices of a layer, and see the same rows."""
        return self.mesh[TENSOR].size()

    @functools.cached_property
    def data_rank(self) -> int:
        """This process's place among those that see different rows."""
        return self.mesh[DATA].get_local_rank()

    @functools.cached_property
    def data_group(self) -> dist.ProcessGroup:
        """The processes that hold what this one does, and see other rows."""
        return self.mesh[DATA].get_group()

    @functools.cached_property
    def tensor_group(self) -> dist.ProcessGroup:
        """The processes that share this one's matrices."""
        return self.mesh[TENSOR].get_group()

    @functools.cached_property
    def tensor_rank(self) -> int:
        """This process's place among them."""
        return self.mesh[TENSOR].get_local_rank()


def loading_options(
    auto_class: Any, model_config: Any, shards: Shards | None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Arguments of from_pretrained with which a base is sharded while it loads.

    Raises:
        UserError: this transformers cannot, or it has no plan for the model.
    """
    if shards is None or shards.data * shards.tensor == 1:
        return {}
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        DistributedConfig(fsdp_size=1)
    except (ImportError, TypeError):
        raise UserError(
            "a sharded base needs a newer transformers: pip install 'transformers>=5.23'."
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
                f"there is no plan for tensor parallelism of a {type(skeleton).__name__}. Use "
                "trainer=fsdp2 or trainer=ddp."
            )
        prefix = skeleton.base_model_prefix
        plans["tp_plan"] = {f"{prefix}.{name}": style for name, style in plan.items()}
    config = DistributedConfig(fsdp_size=shards.data, tp_size=shards.tensor, **plans)
    return {"distributed_config": config}


def check_accelerator(device_type: str) -> None:
    """Raises UserError for processes on another kind of device than transformers shards on."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type != device_type:
        raise UserError(
            f"trainer.accelerator={device_type}: transformers shards a base on the machine's "
            f"accelerator, {accelerator.type}. To rehearse on a CPU, hide it: "
            'CUDA_VISIBLE_DEVICES="" lora-lightning ...'
        )


@contextmanager
def local_rank_in_environment(local_rank: int) -> Iterator[None]:
    """Sets LOCAL_RANK, from which transformers takes its device while it shards a model.

    srun sets SLURM_LOCALID alone, and each task of a node would take the first GPU.
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
    """Raises UserError for heads of attention that cannot be cut evenly."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text or model_config, key, None)
        if isinstance(heads, int) and heads % tensor:
            raise UserError(
                f"tensor parallelism over {tensor} processes: the model's {key} is {heads}, which "
                "cannot be cut evenly. Give another trainer.strategy.tensor_parallel_size, or use "
                "trainer=fsdp2 or trainer=ddp."
            )


def _repeated_layers(model: nn.Module) -> list[str]:
    """Names of the layers that follow each other, with * for their numbers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = model.named_modules()
    found = [name for name, module in named if isinstance(module, GradientCheckpointingLayer)]
    return list(dict.fromkeys(map(with_wildcards, found)))


def with_wildcards(name: str) -> str:
    """A name in which each number is a *, as plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def take_whole(model: nn.Module, name: str, *, draw_again: bool) -> None:
    """Replaces a module by one with plain tensors on the CPU, the same in every process.

    Args:
        model: sharded, or on a GPU.
        name: the module's.
        draw_again: whether its first values are drawn again: by the CPU's generator, so that they
            are the same on any device and in any number of processes.

    Raises:
        UserError: it is a unit of its own of FSDP2, as the head of a language model is.
    """
    from torch.distributed.fsdp import FSDPModule

    module = model.get_submodule(name)
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        raise UserError(
            f"lora.modules_to_save: {name} is sharded and cannot be trained whole. Adapt it "
            "(lora.targets), or use trainer=ddp."
        )
    tensors = [*module.parameters(), *module.buffers()]
    memo = {
        id(tensor): _same_kind(tensor, whole(tensor).detach().cpu().clone()) for tensor in tensors
    }
    plain = copy.deepcopy(module, memo)
    if draw_again:

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


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values; of a sharded one every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that tensor parallelism cuts, or has whole everywhere."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.device_mesh.ndim == 1, "a layer that FSDP2 has not gathered"
    return tensor.to_local()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process rank 0's values: those drawn on different GPUs may differ."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def same_everywhere(number: int, device: torch.device) -> bool:
    """Whether all processes of a run give the same number; all have to ask.

    Args:
        number: less than 2^63.
        device: this process's.
    """
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def gathers_layers(model: nn.Module) -> bool:
    """Whether a pass through the model gathers its layers from processes that see other rows."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


@contextmanager
def gathered(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Holds a part of a model whole, to be called apart from the model's own forward pass.

    Of a base whose layers are gathered from other processes (FSDP2) all processes have to enter.
    The part's weights are gathered once, and dropped at the end where they were in shares before.
    FSDP2's hooks are off meanwhile: they would drop the weights after each call, and count it as a
    pass of the model.
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


def most(model: nn.Module, number: int) -> int:
    """The largest number of any of the processes that go through the model together."""
    if not gathers_layers(model):
        return number
    largest = torch.tensor(number, device=next(model.parameters()).device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
