"""What an adapter covers, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


def count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers parameters stand for; 4-bit weights hold two in a byte."""
    shapes = (getattr(p, "quant_state", p).shape for p in parameters)
    return sum(shape.numel() for shape in shapes)


@dataclass(frozen=True)
class SummaryRow:
    """One adapted module."""

    name: str
    kind: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scaling: float
    parameters: int


@dataclass(frozen=True)
class Summary:
    """What an adapter covers; `str()` gives a table with like modules on one line."""

    rows: list[SummaryRow]
    whole_modules: dict[str, int]
    token_rows: dict[str, tuple[int, int]]
    """(rows, dim) of the trained rows of a vocabulary, by module."""
    trainable: int
    total: int

    def __str__(self) -> str:
        groups: Counter[tuple[str, str, int, int, int, float, float]] = Counter()
        parameters: Counter[tuple[str, str, int, int, int, float, float]] = Counter()
        for row in self.rows:
            leaf = _within_layer(row.name)
            shape = (row.in_features, row.out_features)
            key = (leaf, row.kind, *shape, row.rank, row.alpha, row.scaling)
            groups[key] += 1
            parameters[key] += row.parameters
        lines = [
            f"{'module':<26} {'count':>5} {'in -> out':>14} {'rank':>5} {'alpha':>6} {'scale':>6}"
            f" {'parameters':>12}"
        ]
        for key, count in groups.items():
            leaf, _, fan_in, fan_out, rank, alpha, scaling = key
            lines.append(
                f"{leaf:<26} {count:>5} {f'{fan_in} -> {fan_out}':>14} {rank:>5} {alpha:>6g}"
                f" {scaling:>6.3g} {parameters[key]:>12,}"
            )
        for name, number in self.whole_modules.items():
            lines.append(f"{name:<26} {'whole':>5} {'':>34} {number:>12,}")
        for name, (rows, dim) in self.token_rows.items():
            what = f"{rows} rows"
            lines.append(f"{name:<26} {what:>13} {'':>26} {rows * dim:>12,}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.2f} %)")
        return "\n".join(lines)


def _within_layer(name: str) -> str:
    """A module's name without the layer that it is in: attention.output.dense."""
    *parents, leaf = name.split(".")
    parents = ["*" if part.isdigit() else part for part in parents]
    start = parents.index("*") + 1 if "*" in parents else -1
    return ".".join([*parents[start:], leaf])
