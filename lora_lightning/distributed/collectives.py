"""Sums over ranks that an adapted layer and its base layer share in tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.lora.functional import check_differentiated_once
from lora_lightning.lora.layers.lora_layer import LoraLayer

from .parallel_dims import local_tensor


def join_collectives(layer: LoraLayer, matrix: str, group: dist.ProcessGroup) -> None:
    """Let the base layer and the branch of A and B share one collective.

    In transformers, the base layer runs its own collective. Here the base layer computes only with
    this rank's shard of its weight, as the branch does. The collective then sums the outputs or
    the input gradients of both. Input gradients are summed once for all layers with the same
    input.

    Args:
        layer: Layer whose base layer is sharded.
        matrix: Name of the sharded matrix, "lora_A" or "lora_B".
        group: Ranks that hold the other shards.
    """
    base = layer.base_layer
    assert type(base) is nn.Linear, type(base)
    by_columns = matrix == "lora_B"

    def forward(x: Tensor) -> Tensor:
        bias = local_tensor(base.bias) if by_columns and base.bias is not None else None
        return F.linear(x, local_tensor(base.weight), bias)

    def sum_gradients(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_with_summed_gradient(args[0], group), *args[1:])

    def sum_outputs(_: nn.Module, __: Any, part: Tensor) -> Tensor:
        output: Tensor = _SummedForward.apply(part, group)
        return output if base.bias is None else output + local_tensor(base.bias)

    base.forward = forward  # type: ignore[assignment, method-assign]
    if by_columns:
        layer.register_forward_pre_hook(sum_gradients)
    else:
        layer.register_forward_hook(sum_outputs)


_SUMMED = "_lora_summed"
"""Attribute of an input that holds its version and the tensor that layers read instead."""


def _with_summed_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x for several layers, with their total gradient of it summed over a group."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    if torch.compiler.is_compiling():
        return _SummedBackward.apply(x, group)  # type: ignore[no-any-return]
    version, summed = getattr(x, _SUMMED, (None, x))
    if version != x._version:
        summed = _SummedBackward.apply(x, group)
        setattr(x, _SUMMED, (x._version, summed))
    return summed


class _SummedForward(torch.autograd.Function):
    """Sum over the ranks of a group; the gradient is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SummedBackward(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks of a group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        check_differentiated_once("layers with cut matrices (trainer=tp)", "use another trainer")
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
