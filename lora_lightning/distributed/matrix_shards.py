"""Split of a matrix over ranks, and dropout of a split input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """Split of a matrix into contiguous shards, one per rank of a tensor group.

    Args:
        dim: Sharded dimension, rows (0) or columns (1).
        bounds: Start of each shard, followed by the end of the last one.
    """

    dim: int
    bounds: tuple[int, ...]

    def shape(self, shard: Tensor) -> torch.Size:
        """Return the shape of the whole matrix, given one of its shards."""
        shape = list(shard.shape)
        shape[self.dim] = self.bounds[-1]
        return torch.Size(shape)

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """Return a copy of a rank's shard."""
        start, stop = self.bounds[rank : rank + 2]
        return whole.detach().narrow(self.dim, start, stop - start).clone()

    def gather(self, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the whole matrix; every rank of the group must call this."""
        sizes = [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]
        rows = shard.detach().movedim(self.dim, 0)
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows))).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, self.dim).contiguous()


def even_bounds(size: int, count: int) -> tuple[int, ...]:
    """Return shard bounds as torch.chunk splits, where the last shard may be shorter."""
    each = -(-size // count)
    return tuple(min(each * place, size) for place in range(count + 1))


class ShardedDropout(nn.Dropout):
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
