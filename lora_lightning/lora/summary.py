"""Summary of what an adapter covers, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from .layers.fused_qkv import SplitLayer
from .layers.lora_layer import LoraLayer
from .layers.parameter import LoraParameter
from .moe import expert_parameters
from .name_patterns import within_layer

if TYPE_CHECKING:
    from .model import Adapter


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many values the parameters represent.

    A byte of a 4-bit weight holds two values.
    """
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
    experts: int = 1
    """Number of matrices in the weight."""
    parts: tuple[str, ...] = ()
    """Names of the separately adapted parts of a fused layer."""


@dataclass(frozen=True)
class Summary:
    """What an adapter covers. `str()` gives a table with similar modules on one line."""

    rows: list[SummaryRow]
    whole_modules: dict[str, int]
    token_rows: dict[str, tuple[int, int]]
    """(rows, dim) of the trained vocabulary rows, by module."""
    trainable: int
    total: int
    unadapted_experts: dict[str, int] = field(default_factory=dict)
    """Sizes of expert parameters that are not adapted, by name."""
    skipped_layers: dict[str, str] = field(default_factory=dict)
    """Linear layers that `all-linear` leaves out, with the reason."""

    def __str__(self) -> str:
        groups: Counter[tuple[str, str, int, float, float]] = Counter()
        parameters: Counter[tuple[str, str, int, float, float]] = Counter()
        for row in self.rows:
            leaf = within_layer(row.name) + (f" [{' '.join(row.parts)}]" if row.parts else "")
            shape = f"{row.in_features} -> {row.out_features}"
            if row.experts > 1:
                shape = f"{row.experts} x {shape}"
            key = (leaf, shape, row.rank, row.alpha, row.scaling)
            groups[key] += 1
            parameters[key] += row.parameters
        lines = [
            f"{'module':<26} {'count':>5} {'in -> out':>18} {'rank':>5} {'alpha':>6} {'scale':>6}"
            f" {'parameters':>12}"
        ]
        for key, count in groups.items():
            leaf, shape, rank, alpha, scaling = key
            lines.append(
                f"{leaf:<26} {count:>5} {shape:>18} {rank:>5} {alpha:>6g} {scaling:>6.3g}"
                f" {parameters[key]:>12,}"
            )
        for name, number in self.whole_modules.items():
            lines.append(f"{name:<26} {'whole':>5} {'':>38} {number:>12,}")
        for name, (rows, dim) in self.token_rows.items():
            what = f"{rows} rows"
            lines.append(f"{name:<26} {what:>13} {'':>30} {rows * dim:>12,}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.2f} %)")
        if self.unadapted_experts:
            share = 100 * sum(self.unadapted_experts.values()) / max(self.total, 1)
            names = ",".join(dict.fromkeys(map(within_layer, self.unadapted_experts)))
            lines.append(
                f"{len(self.unadapted_experts)} expert parameters ({share:.1f} % of all parameters)"
                f" are not adapted: set lora.target_parameters=[{names}] to adapt them"
            )
        for reason in dict.fromkeys(self.skipped_layers.values()):
            layers = [name for name, why in self.skipped_layers.items() if why == reason]
            kinds = ", ".join(dict.fromkeys(map(within_layer, layers)))
            lines.append(f"{len(layers)} linear layers are not adapted ({kinds}): {reason}")
        return "\n".join(lines)


def summarize(adapter: Adapter) -> Summary:
    """Return the summary of an adapter in place."""
    model = adapter.model
    return Summary(
        rows=[_row(name, layer, adapter.alphas[name]) for name, layer in adapter.layers.items()],
        whole_modules={
            name: sum(p.numel() for p in model.get_submodule(name).parameters())
            for name in adapter.saved_modules
        },
        token_rows={
            rows.name: (len(rows.indices), adapter.token_rows[rows.name].rows.shape[1])
            for rows in adapter.rows
        },
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=count(model.parameters()),
        unadapted_experts={
            name: parameter.numel()
            for name, parameter in expert_parameters(model).items()
            if name not in adapter.layers and not parameter.requires_grad
        },
        skipped_layers=adapter.skipped_layers,
    )


def _row(name: str, layer: LoraLayer, alpha: float) -> SummaryRow:
    fan_in, fan_out = layer.features()
    tensors = layer.named_tensors().values()
    parts = layer.parts if isinstance(layer, SplitLayer) else ()
    return SummaryRow(
        name=name,
        kind=type(layer.adapted[0]).__name__,
        in_features=fan_in,
        out_features=fan_out,
        rank=layer.rank,
        alpha=alpha,
        scaling=layer.scaling,
        parameters=sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        experts=layer.experts if isinstance(layer, LoraParameter) else 1,
        parts=tuple(part.name for part in parts if part.adapted),
    )
