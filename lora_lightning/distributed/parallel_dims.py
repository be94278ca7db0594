"""Ranks of a run as a device mesh, and the values that they exchange.

Only this file and `sharded_loading` use DTensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""Lightning's names of the dimensions of its device mesh."""


@dataclass(frozen=True)
class ParallelDims:
    """Ranks of a run as a data x tensor mesh, with one batch per row of the mesh.

    Args:
        mesh: Lightning's device mesh, with the dimensions `DATA` and `TENSOR`.
    """

    mesh: DeviceMesh

    @functools.cached_property
    def data(self) -> int:
        """Number of ranks that see different rows; the base's layers are sharded over them."""
        return self.mesh[DATA].size()

    @functools.cached_property
    def tensor(self) -> int:
        """Number of ranks that shard the matrices of a layer and see the same rows."""
        return self.mesh[TENSOR].size()

    @functools.cached_property
    def data_rank(self) -> int:
        """This process's rank among the ranks that see different rows."""
        return self.mesh[DATA].get_local_rank()

    @functools.cached_property
    def data_group(self) -> dist.ProcessGroup:
        """Group of the ranks that hold the same shards as this one and see different rows."""
        return self.mesh[DATA].get_group()

    @functools.cached_property
    def tensor_group(self) -> dist.ProcessGroup:
        """Group of the ranks that shard the same matrices as this one."""
        return self.mesh[TENSOR].get_group()

    @functools.cached_property
    def tensor_rank(self) -> int:
        """This process's rank in `tensor_group`."""
        return self.mesh[TENSOR].get_local_rank()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; every rank must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that tensor parallelism shards or replicates."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.device_mesh.ndim == 1, "a layer that FSDP2 has not gathered"
    return tensor.to_local()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values to all ranks, because values drawn on different GPUs may differ."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def equal_over_ranks(number: int, device: torch.device) -> bool:
    """Return whether all ranks pass the same number; every rank must call this.

    Args:
        number: Number less than 2^63.
        device: Device of this rank.
    """
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends[0] == -ends[1])


def gathers_layers(model: nn.Module) -> bool:
    """Return whether a pass through the model gathers layers from ranks that see other rows."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def max_over_ranks(model: nn.Module, number: int) -> int:
    """Return the largest number over the ranks that run the model together."""
    if not gathers_layers(model):
        return number
    largest = torch.tensor(number, device=next(model.parameters()).device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
