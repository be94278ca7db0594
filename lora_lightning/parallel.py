"""A frozen base in shares, one to each process, and the adapter that all of them train whole.

transformers shards the base while it reads the file, so that no process ever holds all of it: by
layers that are gathered when their turn comes (FSDP2, Zhao et al. 2023, arXiv:2304.11277), by rows
and columns of their matrices (tensor parallelism, Shoeybi et al. 2019, arXiv:1909.08053), or both.
The adapter is small. It stays in plain fp32 tensors, the same in every process, whose gradients are
averaged once a step; so an optimizer, a checkpoint or an export never has anything to gather, and
what was trained one way goes on in another.

This file alone knows of DTensor.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .lora import Adapter, UserError

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
_SHARED: dict[str | None, str] = {"colwise": "lora_B", "rowwise": "lora_A"}
"""By the style of a base layer: the matrix of which each process uses a share."""
_WHOLE = {None, "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
_WHOLE |= {"embedding_rowwise", "embedding_colwise", "replicate"}
"""Styles of layers whose inputs and outputs are whole in every process."""


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
    with torch.device("meta"):
        skeleton = auto_class.from_config(model_config, trust_remote_code=trust_remote_code)
    _check_heads(model_config, shards.tensor)
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


def _check_heads(model_config: Any, tensor: int) -> None:
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
    return list(dict.fromkeys(map(_with_wildcards, found)))


def _with_wildcards(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def take_whole(model: nn.Module, name: str, *, draw_anew: bool) -> None:
    """Puts a module with plain tensors, the same in every process, in the place of a sharded one.

    They are drawn on the CPU, as those of one process are.

    Args:
        model: the sharded model.
        name: the module's.
        draw_anew: whether its values are to be drawn again, as by one process alone.

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
        id(tensor): _same_kind(tensor, whole(tensor).detach().cpu().clone())
        for tensor in tensors
        if isinstance(tensor, DTensor)
    }
    plain = copy.deepcopy(module, memo)
    if draw_anew:
        for part in plain.modules():
            part._is_hf_initialized = False  # type: ignore[assignment]
            for tensor in part.parameters(recurse=False):
                tensor._is_hf_initialized = False  # type: ignore[attr-defined]
            model._init_weights(part)  # type: ignore[operator]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, plain)


def _same_kind(sharded: Tensor, plain: Tensor) -> Tensor:
    if isinstance(sharded, nn.Parameter):
        return nn.Parameter(plain, requires_grad=sharded.requires_grad)
    return plain


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values; of a sharded one every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_adapter(adapter: Adapter, shards: Shards) -> set[nn.Parameter]:
    """Has the adapter's layers compute as the base's plan demands.

    Column by column: every process makes all of A x and its own share of the outputs. Row by row:
    every process has a share of the inputs, and the parts of A x are summed.

    Returns:
        Parameters of whose gradient each process has a share, zeros elsewhere.

    Raises:
        UserError: a layer is cut in a way that an adapter cannot follow.
    """
    if adapter.config.bias != "none":
        raise UserError(
            f"lora.bias={adapter.config.bias} would train biases of the base itself, which is "
            "sharded. Use lora.bias=none, or trainer=ddp."
        )
    if shards.tensor == 1:
        return set()
    plan: dict[str, str] = adapter.model.tp_plan  # type: ignore[assignment]
    shares: set[nn.Parameter] = set()
    for name, layer in adapter.layers.items():
        style = plan.get(_with_wildcards(name))
        shared = _SHARED.get(style)
        if shared is not None:
            layer.add_update = functools.partial(_add_by_shares, shards=shards, shared=shared)
            shares.add(getattr(layer, shared))
        elif style not in _WHOLE:
            raise UserError(
                f"lora.targets: {name} is cut as {style} in tensor parallelism, which an adapter "
                "cannot follow. Leave it out, or use trainer=fsdp2."
            )
    return shares


def _add_by_shares(
    output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    shards: Shards,
    shared: str,
) -> Tensor:
    """`add_low_rank` where output (B shared) or x (A shared) is this process's share of the whole.

    In both the narrow product in the middle is whole: of a share of x its parts are summed, of
    shares of the output its gradients are.
    """
    if shared == "lora_A":
        lora_A = _share(lora_A, 1, x.shape[-1], shards)
        down = _SummedForward.apply(F.linear(x, lora_A.to(x.dtype)), shards.tensor_group)
    else:
        lora_B = _share(lora_B, 0, output.shape[-1], shards)
        down = _SummedBackward.apply(F.linear(x, lora_A.to(x.dtype)), shards.tensor_group)
    up = F.linear(down * scaling, lora_B.to(down.dtype))
    return output + up.to(output.dtype)


def _share(matrix: Tensor, dim: int, size: int, shards: Shards) -> Tensor:
    """This process's rows (dim 0) or columns (1): the cut of torch.chunk, the last may be short."""
    each = -(-matrix.shape[dim] // shards.tensor)
    return matrix.narrow(dim, shards.tensor_rank * each, size)


class _SummedForward(torch.autograd.Function):
    """The sum over the processes of a group; its gradient is the same in all of them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SummedBackward(torch.autograd.Function):
    """The tensor itself; its gradient is the sum of those of the processes of a group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process rank 0's values: those drawn on different GPUs may differ."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


@torch.no_grad()
def average_gradients(
    parameters: Iterable[nn.Parameter], shares: set[nn.Parameter], shards: Shards
) -> None:
    """Makes each gradient the mean over the processes that see different rows.

    Args:
        parameters: all that is trained, in the same order everywhere.
        shares: those of which each process of a tensor group has a share of the gradient.
        shards: the processes.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return
    parts = [
        parameter.grad.reshape(-1) * (shards.tensor if parameter in shares else 1)  # type: ignore[union-attr]
        for parameter in trained
    ]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [parameter.numel() for parameter in trained]
    for parameter, mean in zip(trained, flat.split(sizes), strict=True):
        parameter.grad.copy_(mean.view_as(parameter))  # type: ignore[union-attr]


def gathers_layers(model: nn.Module) -> bool:
    """Whether a pass through the model gathers its layers from processes that see other rows."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def any_rank(model: nn.Module, flag: bool) -> bool:
    """Whether the flag is set in any of the processes that go through the model together."""
    if not gathers_layers(model):
        return flag
    found = torch.tensor(int(flag), device=next(model.parameters()).device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)
