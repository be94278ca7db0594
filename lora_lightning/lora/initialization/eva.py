"""EVA: A from what the layers see of the data, and ranks where that varies most.

Paischer et al. 2024, arXiv:2410.07170, as their code in PEFT computes it: A's rows are the first
principal components of a layer's inputs, B is zero, and the ranks of all layers together go to the
components that explain the largest shares of their layers' variance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.lora.config import LoraConfig
from lora_lightning.lora.rng import fork_rng
from lora_lightning.lora.target_modules import Match, match_targets

SETTLED = 0.99
"""Cosine similarity of a component with that of the batch before, from which it has converged."""
OVERSAMPLING = 4
"""Columns of the randomised decomposition for each component that is wanted."""


class StreamedComponents:
    """Principal components of rows that come batch by batch (Ross et al. 2008, incremental PCA).

    Args:
        count: components to keep; fewer where rows are shorter.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.settled = torch.zeros(count, dtype=torch.bool, device="cpu")
        """Which components the last batch has hardly turned."""
        self._mean = torch.zeros((), device="cpu", dtype=torch.float32)
        self._total = 0.0
        self.components = torch.zeros(0, 0, device="cpu", dtype=torch.float32)
        """(count, in), orthonormal, the largest first."""
        self._singular = torch.zeros(0, device="cpu", dtype=torch.float32)

    def update(self, rows: Tensor) -> None:
        """Takes in rows, (n, in)."""
        rows = rows.float()
        count = len(rows)
        mean = rows.mean(0)
        centred = rows - mean
        between = self.seen * count / (self.seen + count)
        shift = between**0.5 * (self._mean - mean)
        self._total += float(centred.square().sum() + shift.square().sum())
        old = self._singular[:, None] * self.components
        stack = [old, centred, shift[None]] if self.seen else [centred]
        singular, components = _leading(torch.cat(stack), self.count)
        self._mean = (self.seen * self._mean + count * mean) / (self.seen + count)
        if self.seen:
            known = min(len(components), len(self.components))
            turned = nn.functional.cosine_similarity(components[:known], self.components[:known])
            self.settled = nn.functional.pad(turned.abs() >= SETTLED, (0, self.count - known))
        self.seen += count
        self._singular, self.components = singular, components

    def shares(self) -> Tensor:
        """The share of the rows' variance that each component explains."""
        return self._singular.square() / max(self._total, 1e-30)


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values and right singular vectors, the same from the same matrix."""
    smaller = min(matrix.shape)
    count = min(count, smaller)
    if OVERSAMPLING * count >= smaller:
        _, singular, vectors = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with fork_rng(matrix.device):
            torch.manual_seed(0)
            _, singular, v = torch.svd_lowrank(matrix, OVERSAMPLING * count, niter=2)
        vectors = v.t()
    vectors = vectors[:count]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return singular[:count], vectors * largest.sign()


@dataclass
class Start:
    """What EVA found: a plain adapter's settings, and A, (r, in), by layer."""

    config: LoraConfig
    matrices: dict[str, Tensor]


@torch.no_grad()
def start_from_data(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[dict[str, Tensor]],
    forward: Callable[[dict[str, Tensor]], Any],
    *,
    show: Callable[[int, int], Any] = lambda settled, layers: None,
) -> Start:
    """First matrices and ranks of an adapter, from what its layers see.

    Batches are gone through until all components that get a rank have converged, or to their end.
    Layers that see the same inputs share a decomposition.

    Args:
        model: without the adapter.
        config: of the adapter, with `init` "eva".
        batches: with `attention_mask` (rows, positions), and `labels` where each token has one;
            what the mask hides, or whose label is -100, does not count.
        forward: runs the model on a batch.
        show: told of the decompositions that have converged, and of all.

    Raises:
        UserError: no layer is linear, or there is no batch.
    """
    matches = match_targets(model, config)
    linear = [match for match in matches if not isinstance(match.module, nn.Embedding)]
    if not linear:
        raise UserError("lora.init=eva looks at the inputs of linear layers, and adapts none here.")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError("lora.init=eva needs training rows to look at.")
    source = _shared_inputs(linear, partial(forward, first))
    wanted = {match.name: round(config.eva_rho * match.rank) for match in linear}
    streams = {
        name: StreamedComponents(max(wanted[own] for own in source if source[own] == name))
        for name in dict.fromkeys(source.values())
    }
    budget = sum(match.rank for match in linear if match.name in source)
    ranks: dict[str, int] = {}
    heads = [match for match in linear if match.name in streams]
    for batch in chain([first], iterator):
        _look(heads, streams, batch, forward)
        ranks = distributed({n: streams[source[n]].shares()[: wanted[n]] for n in source}, budget)
        done = [
            all(bool(stream.settled[: ranks[n]].all()) for n in source if source[n] == name)
            for name, stream in streams.items()
        ]
        show(sum(done), len(done))
        if all(done):
            break
    matrices = {
        name: streams[source[name]].components[:rank] for name, rank in ranks.items() if rank
    }
    return Start(_resolved(config, matches, ranks), matrices)


def distributed(shares: dict[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares each layer has; equals go to earlier layers."""
    owners = [name for name, values in shares.items() for _ in values]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)
    counts = Counter(owners[place] for place in order[:budget].tolist())
    return {name: counts[name] for name in shares}


def _watched(
    matches: list[Match], see: Callable[[str, Tensor], None], run: Callable[[], Any]
) -> None:
    """Runs a pass of the model, in which `see` is given what each layer is given."""
    hooks = [
        match.module.register_forward_pre_hook(lambda _, args, name=match.name: see(name, args[0]))
        for match in matches
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


def _shared_inputs(matches: list[Match], run: Callable[[], Any]) -> dict[str, str]:
    """For each layer that is called the first one that is given the very same tensor."""
    inputs: dict[str, Tensor] = {}  # held, so that no id is used twice
    _watched(matches, inputs.__setitem__, run)
    first: dict[int, str] = {}
    return {
        match.name: first.setdefault(id(inputs[match.name]), match.name)
        for match in matches
        if match.name in inputs
    }


def _look(
    matches: list[Match],
    streams: dict[str, StreamedComponents],
    batch: dict[str, Tensor],
    forward: Callable[[dict[str, Tensor]], Any],
) -> None:
    """One pass of the model, in which each stream takes in what its layer is given."""

    def see(name: str, inputs: Tensor) -> None:
        streams[name].update(counted(inputs, batch))

    _watched(matches, see, partial(forward, batch))


def counted(inputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The rows of a layer's inputs, (n, in), that are of tokens that count.

    Inputs are (rows, positions, in), or the same flattened, as a router sees them, or as one row,
    as for flash attention; those of another shape count whole: what a pooler sees has no padding.
    """
    flat = inputs.flatten(0, -2)
    keep = torch.ones(len(flat), dtype=torch.bool, device=inputs.device)
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    masks = [] if mask is None else [mask.bool()]
    if labels is not None and labels.dim() > 1:
        masks.append(labels != -100)
    for each in masks:
        if inputs.shape[:-1] in (each.shape, (each.numel(),), (1, each.numel())):
            keep &= each.flatten()
    return flat[keep]


def _resolved(config: LoraConfig, matches: list[Match], ranks: dict[str, int]) -> LoraConfig:
    """The same adapter as plain LoRA: layers, ranks and alphas by name; each keeps its scaling."""
    kept = {match.name: ranks.get(match.name, match.rank) for match in matches}
    kept = {name: rank for name, rank in kept.items() if rank}
    return replace(
        config,
        init="kaiming",
        targets=list(kept),
        exclude=[],
        layers=None,
        layers_pattern=None,
        rank_pattern=kept,
        alpha_pattern={
            name: config.scaling_of(name) * config.divisor(rank) for name, rank in kept.items()
        },
    )
