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
from torch import Tensor, nn

from lora_lightning.lora import Adapter, UserError
from lora_lightning.lora.layers.fused_parts import Part, cut_parts
from lora_lightning.lora.layers.fused_qkv import SplitLayer
from lora_lightning.lora.layers.lora_layer import LoraLayer

from .collectives import join_collectives
from .matrix_shards import Cut, ShardedDropout, even_bounds
from .parallel_dims import ParallelDims
from .sharded_loading import with_wildcards

_SHARDED: dict[str | None, str] = {"colwise": "lora_B", "rowwise": "lora_A"}
"""The matrix that is sharded over the ranks, by the style of the base layer."""
_WHOLE = {None, "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"}
_WHOLE |= {"embedding_rowwise", "embedding_colwise", "replicate"}
"""Styles of layers whose inputs and outputs are whole on every rank."""


@dataclass(frozen=True)
class _ShardedLayer:
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


class Placement:
    """Placement of an adapter's matrices on the ranks.

    Args:
        shards: The ranks of the run.
        sharded: Layers with a sharded matrix. The constructor shards them.
    """

    def __init__(self, shards: ParallelDims, sharded: list[_ShardedLayer]) -> None:
        self.shards = shards
        self._sharded = sharded
        self._are_whole = False
        for layer in sharded:
            shard = layer.cut.take(layer.matrix, shards.tensor_rank)
            layer.put(nn.Parameter(shard, requires_grad=layer.matrix.requires_grad), whole=False)
        self.cuts = {layer.matrix: layer.cut for layer in sharded}
        """Split of each sharded parameter."""
        self._partial = {layer.other for layer in sharded}
        """Whole parameters that receive a partial gradient on each rank."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the layers hold whole matrices within the block; all ranks must enter it.

        On exit, each rank keeps its shard of the current values.
        """
        if self._are_whole:
            yield
            return
        kept = [layer.matrix for layer in self._sharded]
        for layer in self._sharded:
            matrix = layer.cut.gather(layer.matrix, self.shards.tensor_group)
            layer.put(nn.Parameter(matrix, requires_grad=layer.matrix.requires_grad), whole=True)
        self._are_whole = True
        try:
            yield
        finally:
            self._are_whole = False
            for layer, shard in zip(self._sharded, kept, strict=True):
                shard.data.copy_(layer.cut.take(layer.matrix, self.shards.tensor_rank))
                layer.put(shard, whole=False)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average each gradient over the ranks that see different rows.

        Gradients of whole matrices are averaged over all ranks, so they are bitwise identical
        everywhere. Partial gradients are summed over the ranks that see the same rows.

        Args:
            parameters: All trainable parameters, in the same order on every rank.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        if parts := [p.grad for p in trained if p in self._partial]:
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
        for index, sharded in enumerate((False, True)):
            grads = [p.grad for p in trained if (p in self.cuts) is sharded]
            if grads:
                norms[index] = nn.utils.get_total_norm(grads)  # type: ignore[arg-type]
        of_whole, of_shards = norms.square()
        dist.all_reduce(of_shards, group=self.shards.tensor_group)
        nn.utils.clip_grads_with_norm_(trained, most, (of_whole + of_shards).sqrt())

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

    def shard_of_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Any:
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
        gradients, [mean.view_as(gradient) for gradient, mean in zip(gradients, means, strict=True)]
    )


def place_adapter(adapter: Adapter, shards: ParallelDims) -> Placement:
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
    sharded: list[_ShardedLayer] = []
    for name, layer in adapter.layers.items():
        style = plan.get(with_wildcards(name))
        matrix = _SHARDED.get(style)
        if matrix is not None:
            join_collectives(layer, matrix, shards.tensor_group)
            sharded.append(_sharded_layer(layer, matrix, shards))
            if matrix == "lora_A" and isinstance(layer.dropout, nn.Dropout):
                cut = sharded[-1].cut
                layer.dropout = ShardedDropout(layer.dropout.p, cut, shards.tensor_rank)
        elif style not in _WHOLE:
            raise UserError(
                f"lora.targets: {name} is not supported with trainer=tp, which shards it as "
                f"{style}. Remove it, or use trainer=fsdp2."
            )
    return Placement(shards, sharded)


def _sharded_layer(layer: LoraLayer, matrix: str, shards: ParallelDims) -> _ShardedLayer:
    fan_in, fan_out = layer.features()
    if matrix == "lora_A":
        return _ShardedLayer(layer, matrix, Cut(1, even_bounds(fan_in, shards.tensor)))
    bounds = even_bounds(fan_out, shards.tensor)
    if not isinstance(layer, SplitLayer):
        return _ShardedLayer(layer, matrix, Cut(0, bounds))
    # B has rows only for adapted parts.
    rows = [
        sum(part.size or 0 for part in cut_parts(layer.parts, 0, bound) if part.adapted)
        for bound in bounds
    ]
    start, stop = bounds[shards.tensor_rank : shards.tensor_rank + 2]
    parts = (layer.parts, cut_parts(layer.parts, start, stop))
    return _ShardedLayer(layer, matrix, Cut(0, tuple(rows)), parts)
