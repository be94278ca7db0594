"""The adapter on a base in shares: which process holds what of it, and what it computes with that.

An adapter is small. Each process has all of it in plain fp32 tensors, whose gradients are averaged
once a step, but for what tensor parallelism cuts: of a layer whose outputs are shared out A is
whole and B in shares, of one whose inputs are B is whole and A in shares (Shoeybi et al. 2019,
arXiv:1909.08053, of the base layers). A share lives where it is used, and so does the optimizer's
state of it. Checkpoints and exports hold whole matrices, whoever writes them.
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
from lora_lightning.lora.functional import refuse_second_derivatives
from lora_lightning.lora.layers.fused_parts import Part, within
from lora_lightning.lora.layers.fused_qkv import SplitLayer
from lora_lightning.lora.layers.linear import LoraLayer

from .sharded_loading import Shards, local, with_wildcards

_SHARED: dict[str | None, str] = {"colwise": "lora_B", "rowwise": "lora_A"}
"""By the style of a base layer: the matrix of which each process has a share."""
_WHOLE = {None, "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
_WHOLE |= {"embedding_rowwise", "embedding_colwise", "replicate"}
"""Styles of layers whose inputs and outputs are whole in every process."""


@dataclass(frozen=True)
class Cut:
    """A matrix in contiguous shares, one for each process of a tensor group.

    Args:
        dim: what is shared out, rows (0) or columns (1).
        bounds: where each share begins, and the end of the last.
    """

    dim: int
    bounds: tuple[int, ...]

    def shape(self, share: Tensor) -> torch.Size:
        """The whole matrix's, from one of its shares."""
        shape = list(share.shape)
        shape[self.dim] = self.bounds[-1]
        return torch.Size(shape)

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """A process's share, in memory of its own."""
        start, stop = self.bounds[rank : rank + 2]
        return whole.detach().narrow(self.dim, start, stop - start).clone()

    def gather(self, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The whole matrix; every process of the group has to ask."""
        sizes = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        rows = share.detach().movedim(self.dim, 0)
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, self.dim).contiguous()


def even_bounds(size: int, count: int) -> tuple[int, ...]:
    """Where shares begin and the last ends, by the cut of torch.chunk: the last may be short."""
    each = -(-size // count)
    return tuple(min(each * place, size) for place in range(count + 1))


@dataclass(frozen=True)
class _Shared:
    """A layer of which this process has a share of one matrix.

    Args:
        layer: the layer.
        name: of the matrix.
        cut: how it is shared out.
        parts: of a layer in parts those of the whole, and of this process's outputs.
    """

    layer: LoraLayer
    name: str
    cut: Cut
    parts: tuple[tuple[Part, ...], tuple[Part, ...]] | None = None

    @property
    def matrix(self) -> nn.Parameter:
        """What the layer holds at the moment."""
        return getattr(self.layer, self.name)  # type: ignore[no-any-return]

    @property
    def other(self) -> nn.Parameter:
        """The matrix that every process has all of."""
        name = "lora_A" if self.name == "lora_B" else "lora_B"
        return getattr(self.layer, name)  # type: ignore[no-any-return]

    def put(self, matrix: nn.Parameter, *, whole: bool) -> None:
        """Has the layer hold the whole matrix, or this process's share."""
        setattr(self.layer, self.name, matrix)
        if self.parts is not None:
            assert isinstance(self.layer, SplitLayer)
            self.layer.parts = self.parts[0 if whole else 1]


class ShareOfDropout(nn.Dropout):
    """Dropout of this process's columns of an input that is shared out.

    It draws for all columns, as one process does, and takes its own: processes of a tensor group
    have the same generator, and would drop the same places of each share.

    Args:
        p: probability of dropping an element.
        cut: how the columns are shared out.
        rank: of this process in the tensor group.
    """

    def __init__(self, p: float, cut: Cut, rank: int) -> None:
        super().__init__(p)
        self.start, self.stop, self.width = *cut.bounds[rank : rank + 2], cut.bounds[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Like torch's; x is (..., columns of this process)."""
        if not self.training or self.p == 0.0:
            return x
        drawn = F.dropout(x.new_ones(*x.shape[:-1], self.width), self.p)
        return x * drawn[..., self.start : self.stop]


class Placement:
    """Which process holds what of an adapter.

    Args:
        shards: the processes.
        shared: the layers of which each process has a share, which are cut here.
    """

    def __init__(self, shards: Shards, shared: list[_Shared]) -> None:
        self.shards = shards
        self._shared = shared
        self._are_whole = False
        for one in shared:
            share = one.cut.take(one.matrix, shards.tensor_rank)
            one.put(nn.Parameter(share, requires_grad=one.matrix.requires_grad), whole=False)
        self.cuts = {one.matrix: one.cut for one in shared}
        """Of those parameters of which this process has a share."""
        self._parted = {one.other for one in shared}
        """Parameters that are whole, and get a part of their gradients in each process."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Has the layers hold whole matrices for the time of the block; all processes have to.

        Each then keeps its share of what these are at the end.
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
        """Makes each gradient the mean over the processes that see different rows.

        Those of whole matrices are averaged over all processes, and so the same in all of them to
        the last bit. Parts of one are summed over the processes that see the same rows.

        Args:
            parameters: all that is trained, in the same order everywhere.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if parts := [p.grad for p in trained if p in self._parted]:
            torch._foreach_mul_(parts, self.shards.tensor)  # type: ignore[arg-type]
        _average([p.grad for p in trained if p not in self.cuts], None)
        if self.shards.data > 1:
            _average([p.grad for p in trained if p in self.cuts], self.shards.data_group)

    @torch.no_grad()
    def clip_by_norm(self, parameters: Iterable[nn.Parameter], most: float) -> None:
        """Scales gradients down until the norm of all of them, over whole matrices, is `most`.

        Args:
            parameters: all that is trained.
            most: the highest 2-norm of the gradients as one vector.
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

    # What an optimizer keeps of a share it keeps in the share's shape.

    def whole_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Any:
        """An optimizer's state with whole matrices; every process has to ask.

        Args:
            optimizer: of this process.
            state: its state.
        """

        def gather(value: Tensor, parameter: nn.Parameter, cut: Cut) -> Tensor:
            if value.shape != parameter.shape:
                return value
            return cut.gather(value, self.shards.tensor_group).cpu()

        return self._with(optimizer, state, gather)

    def share_of_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Any:
        """The reverse of `whole_state`."""

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
    """Makes each tensor the mean over the processes of a group; None: all."""
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
    """Has the adapter's layers hold and compute what the base's plan demands.

    Column by column: every process makes all of A x, and with its rows of B its own share of the
    outputs. Row by row: every process has a share of the inputs and those columns of A, and what
    it makes of them with B is a part of the sum that all outputs are.

    So the matrix that is whole gets a part of its gradient in each process. The parts are summed
    once a step, and nothing is exchanged for the adapter but what the base exchanges (Shoeybi et
    al. 2019, arXiv:1909.08053, section 3).

    Raises:
        UserError: a layer is cut in a way that an adapter cannot follow.
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
    # B has the rows of adapted parts alone.
    rows = [
        sum(part.size or 0 for part in within(layer.parts, 0, bound) if part.adapted)
        for bound in bounds
    ]
    start, stop = bounds[shards.tensor_rank : shards.tensor_rank + 2]
    parts = (layer.parts, within(layer.parts, start, stop))
    return _Shared(layer, matrix, Cut(0, tuple(rows)), parts)


def _join_collectives(layer: LoraLayer, matrix: str, group: dist.ProcessGroup) -> None:
    """Has the base layer and the branch of A and B exchange with other processes together.

    transformers has the base layer do it alone. Here the base layer computes with this process's
    share of its weight, as the branch does, and what is summed is the sum of both: the outputs, or
    the gradients of the input, once for all layers that have that input in common.

    Args:
        layer: whose base layer is cut.
        matrix: the one that is cut, "lora_A" or "lora_B".
        group: the processes that have the others.
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
"""Attribute of an input: its version, and the tensor through which layers read it."""


def _with_summed_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns x for several layers; the sum of their gradients of it is summed over a group."""
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
        refuse_second_derivatives("layers with cut matrices (trainer=tp)", "use another trainer")
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
