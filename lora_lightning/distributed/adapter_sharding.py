"""Placement of an adapter on a sharded base: what each rank holds and computes.

An adapter is small. Each rank holds all of it in plain fp32 tensors, except matrices that tensor
parallelism shards. Gradients are averaged once per step.

Tensor parallelism shards B, with A whole, in a layer whose outputs are sharded. It shards A, with
B whole, in a layer whose inputs are sharded. Shoeybi et al. 2019, arXiv:1909.08053, describe this
sharding for the base layers.

A shard and its optimizer state stay on the rank that uses them. Checkpoints and exports hold whole
matrices, whichever rank writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.lora import Adapter, UserError
from lora_lightning.lora.functional import check_differentiated_once
from lora_lightning.lora.layers.fused_parts import Part, cut_parts
from lora_lightning.lora.layers.fused_qkv import SplitLayer
from lora_lightning.lora.layers.lora_layer import LoraLayer

from .sharded_loading import Shards, local, with_wildcards

_SHARED: dict[str | None, str] = {"colwise": "lora_B", "rowwise": "lora_A"}
"""The matrix that is sharded over the ranks, by the style of the base layer."""
_WHOLE = {None, "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
_WHOLE |= {"embedding_rowwise", "embedding_colwise", "replicate"}
"""Styles of layers whose inputs and outputs are whole on every rank."""


@dataclass(frozen=True)
class Cut:
    """Split of a matrix into contiguous shards, one per rank of a tensor group.

    Args:
        dim: Sharded dimension, rows (0) or columns (1).
        bounds: Start of each shard, followed by the end of the last one.
    """

    dim: int
    bounds: tuple[int, ...]

    def shape(self, share: Tensor) -> torch.Size:
        """Return the shape of the whole matrix, given one of its shards."""
        shape = list(share.shape)
        shape[self.dim] = self.bounds[-1]
        return torch.Size(shape)

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """Return a copy of a rank's shard."""
        start, stop = self.bounds[rank : rank + 2]
        return whole.detach().narrow(self.dim, start, stop - start).clone()

    def gather(self, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the whole matrix; every rank of the group must call this."""
        sizes = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        rows = share.detach().movedim(self.dim, 0)
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, self.dim).contiguous()


def even_bounds(size: int, count: int) -> tuple[int, ...]:
    """Return shard bounds as torch.chunk splits, where the last shard may be shorter."""
    each = -(-size // count)
    return tuple(min(each * place, size) for place in range(count + 1))


@dataclass(frozen=True)
class _Shared:
    """A layer with one sharded matrix.

    Args:
        layer: The layer.
        name: Name of the sharded matrix.
        cut: Split of the matrix.
        parts: For a layer with parts, the parts of the whole layer and the parts of this rank's
            outputs. Defaults to None.
    """

    layer: LoraLayer
    name: str
    cut: Cut
    parts: tuple[tuple[Part, ...], tuple[Part, ...]] | None = None

    @property
    def matrix(self) -> nn.Parameter:
        """The matrix that the layer currently holds, whole or sharded."""
        return getattr(self.layer, self.name)  # type: ignore[no-any-return]

    @property
    def other(self) -> nn.Parameter:
        """The matrix that is whole on every rank."""
        name = "lora_A" if self.name == "lora_B" else "lora_B"
        return getattr(self.layer, name)  # type: ignore[no-any-return]

    def put(self, matrix: nn.Parameter, *, whole: bool) -> None:
        """Set the layer's matrix to the whole one or to this rank's shard."""
        setattr(self.layer, self.name, matrix)
        if self.parts is not None:
            assert isinstance(self.layer, SplitLayer)
            self.layer.parts = self.parts[0 if whole else 1]


class ShareOfDropout(nn.Dropout):
    """Dropout of this rank's columns of a sharded input.

    It draws a mask for all columns, as a single process does, and uses its own columns.
    Ranks of a tensor group have identical generators. Separate draws drop the same positions in
    each shard.

    Args:
        p: Probability of dropping an element.
        cut: Split of the columns.
        rank: This process's rank in the tensor group.
    """

    def __init__(self, p: float, cut: Cut, rank: int) -> None:
        super().__init__(p)
        self.start, self.stop, self.width = *cut.bounds[rank : rank + 2], cut.bounds[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout as torch does; x has shape (..., columns of this rank)."""
        if not self.training or self.p == 0.0:
            return x
        drawn = F.dropout(x.new_ones(*x.shape[:-1], self.width), self.p)
        return x * drawn[..., self.start : self.stop]


class Placement:
    """Placement of an adapter's matrices on the ranks.

    Args:
        shards: The ranks of the run.
        shared: Layers with a sharded matrix. The constructor shards them.
    """

    def __init__(self, shards: Shards, shared: list[_Shared]) -> None:
        self.shards = shards
        self._shared = shared
        self._are_whole = False
        for one in shared:
            share = one.cut.take(one.matrix, shards.tensor_rank)
            one.put(nn.Parameter(share, requires_grad=one.matrix.requires_grad), whole=False)
        self.cuts = {one.matrix: one.cut for one in shared}
        """Split of each sharded parameter."""
        self._parted = {one.other for one in shared}
        """Whole parameters that receive a partial gradient on each rank."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the layers hold whole matrices within the block; all ranks must enter it.

        On exit, each rank keeps its shard of the current values.
        """
        if self._are_whole:
            yield
            return
        shares = [one.matrix for one in self._shared]
        for one in self._shared:
            matrix = one.cut.gather(one.matrix, self.shards.tensor_group)
            one.put(nn.Parameter(matrix, requires_grad=one.matrix.requires_grad), whole=True)
        self._are_whole = True
        try:
            yield
        finally:
            self._are_whole = False
            for one, share in zip(self._shared, shares, strict=True):
                share.data.copy_(one.cut.take(one.matrix, self.shards.tensor_rank))
                one.put(share, whole=False)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average each gradient over the ranks that see different rows.

        Gradients of whole matrices are averaged over all ranks, so they are bitwise identical
        everywhere. Partial gradients are summed over the ranks that see the same rows.

        Args:
            parameters: All trainable parameters, in the same order on every rank.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if parts := [p.grad for p in trained if p in self._parted]:
            torch._foreach_mul_(parts, self.shards.tensor)  # type: ignore[arg-type]
        _average([p.grad for p in trained if p not in self.cuts], None)
        if self.shards.data > 1:
            _average([p.grad for p in trained if p in self.cuts], self.shards.data_group)

    @torch.no_grad()
    def clip_by_norm(self, parameters: Iterable[nn.Parameter], most: float) -> None:
        """Clip the gradients to a total norm of `most`, computed over whole matrices.

        Args:
            parameters: All trainable parameters.
            most: Maximum 2-norm of all gradients as one vector.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if not trained:
            return
        norms = torch.zeros(2, device=trained[0].device, dtype=torch.float32)
        for place, in_shares in enumerate((False, True)):
            grads = [p.grad for p in trained if (p in self.cuts) is in_shares]
            if grads:
                norms[place] = nn.utils.get_total_norm(grads)  # type: ignore[arg-type]
        of_whole, of_shares = norms.square()
        dist.all_reduce(of_shares, group=self.shards.tensor_group)
        nn.utils.clip_grads_with_norm_(trained, most, (of_whole + of_shares).sqrt())

    # An optimizer's per-parameter state of a shard has the shape of the shard.

    def whole_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Any:
        """Return an optimizer's state with whole matrices; every rank must call this.

        Args:
            optimizer: Optimizer of this rank.
            state: State of the optimizer.
        """

        def gather(value: Tensor, parameter: nn.Parameter, cut: Cut) -> Tensor:
            if value.shape != parameter.shape:
                return value
            return cut.gather(value, self.shards.tensor_group).cpu()

        return self._with(optimizer, state, gather)

    def share_of_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Any:
        """Return this rank's shards of a whole state, the inverse of `whole_state`."""

        def take(value: Tensor, parameter: nn.Parameter, cut: Cut) -> Tensor:
            if value.shape != cut.shape(parameter):
                return value
            return cut.take(value, self.shards.tensor_rank)

        return self._with(optimizer, state, take)

    def _with(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], change: Any) -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        changed = dict(state["state"])
        for index, values in state["state"].items():
            if (cut := self.cuts.get(parameters[index])) is not None:
                changed[index] = {
                    name: change(value, parameters[index], cut)
                    if isinstance(value, Tensor)
                    else value
                    for name, value in values.items()
                }
        return {**state, "state": changed}


def _average(gradients: list[Any], group: dist.ProcessGroup | None) -> None:
    """Average each tensor in place over the ranks of a group, or over all ranks for None."""
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    means = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(
        gradients, [mean.view_as(one) for one, mean in zip(gradients, means, strict=True)]
    )


def place_adapter(adapter: Adapter, shards: Shards) -> Placement:
    """Shard the adapter's layers to match the base's tensor-parallel plan.

    In a columnwise layer, every rank computes all of A x. Its rows of B give its shard of the
    outputs. In a rowwise layer, every rank holds a shard of the inputs and the matching columns of
    A. Its product with B is one summand of the outputs.

    The whole matrix therefore receives a partial gradient on each rank. The partial gradients are
    summed once per step. The adapter adds no other communication to the base's own (Shoeybi et al.
    2019, arXiv:1909.08053, section 3).

    Raises:
        UserError: If a layer is sharded in a way that an adapter does not support.
    """
    if shards.tensor == 1:
        return Placement(shards, [])
    plan: dict[str, str] = adapter.model.tp_plan  # type: ignore[assignment]
    shared: list[_Shared] = []
    for name, layer in adapter.layers.items():
        style = plan.get(with_wildcards(name))
        matrix = _SHARED.get(style)
        if matrix is not None:
            _join_collectives(layer, matrix, shards.tensor_group)
            shared.append(_shared_out(layer, matrix, shards))
            if matrix == "lora_A" and isinstance(layer.dropout, nn.Dropout):
                cut = shared[-1].cut
                layer.dropout = ShareOfDropout(layer.dropout.p, cut, shards.tensor_rank)
        elif style not in _WHOLE:
            raise UserError(
                f"lora.targets: {name} is cut as {style} in tensor parallelism, which an adapter "
                "cannot follow. Leave it out, or use trainer=fsdp2."
            )
    return Placement(shards, shared)


def _shared_out(layer: LoraLayer, matrix: str, shards: Shards) -> _Shared:
    fan_in, fan_out = layer.features()
    if matrix == "lora_A":
        return _Shared(layer, matrix, Cut(1, even_bounds(fan_in, shards.tensor)))
    bounds = even_bounds(fan_out, shards.tensor)
    if not isinstance(layer, SplitLayer):
        return _Shared(layer, matrix, Cut(0, bounds))
    # B has rows only for adapted parts.
    rows = [
        sum(part.size or 0 for part in cut_parts(layer.parts, 0, bound) if part.adapted)
        for bound in bounds
    ]
    start, stop = bounds[shards.tensor_rank : shards.tensor_rank + 2]
    parts = (layer.parts, cut_parts(layer.parts, start, stop))
    return _Shared(layer, matrix, Cut(0, tuple(rows)), parts)


def _join_collectives(layer: LoraLayer, matrix: str, group: dist.ProcessGroup) -> None:
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
        bias = local(base.bias) if by_columns and base.bias is not None else None
        return F.linear(x, local(base.weight), bias)

    def sum_gradients(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_with_summed_gradient(args[0], group), *args[1:])

    def sum_outputs(_: nn.Module, __: Any, part: Tensor) -> Tensor:
        output: Tensor = _SummedForward.apply(part, group)
        return output if base.bias is None else output + local(base.bias)

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
