"""EVA: A from the inputs of the layers, and higher ranks where these inputs vary most.

Paischer et al. 2024, arXiv:2410.07170, as computed by their code in PEFT. The rows of A are the
first principal components of a layer's inputs, and B is zero. The total rank of all layers goes to
the components that explain the largest shares of their layers' variance.
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
"""Cosine similarity to the previous batch's component at which a component has converged."""
OVERSAMPLING = 4
"""Columns of the randomized decomposition per requested component."""


class StreamedComponents:
    """Principal components of rows that arrive in batches (Ross et al. 2008, incremental PCA).

    Args:
        count: number of components to keep. Shorter rows give fewer.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.settled = torch.zeros(count, dtype=torch.bool, device="cpu")
        """Which components the last batch has hardly rotated."""
        self._mean = torch.zeros((), device="cpu", dtype=torch.float32)
        self._total = 0.0
        self.components = torch.zeros(0, 0, device="cpu", dtype=torch.float32)
        """(count, in), orthonormal, the largest first."""
        self._singular = torch.zeros(0, device="cpu", dtype=torch.float32)

    def update(self, rows: Tensor) -> None:
        """Update the components with rows, (n, in)."""
        rows = rows.float()
        count = len(rows)
        mean = rows.mean(0)
        centered = rows - mean
        between = self.seen * count / (self.seen + count)
        shift = between**0.5 * (self._mean - mean)
        self._total += float(centered.square().sum() + shift.square().sum())
        old = self._singular[:, None] * self.components
        stack = [old, centered, shift[None]] if self.seen else [centered]
        singular, components = _leading(torch.cat(stack), self.count)
        self._mean = (self.seen * self._mean + count * mean) / (self.seen + count)
        if self.seen:
            known = min(len(components), len(self.components))
            turned = nn.functional.cosine_similarity(components[:known], self.components[:known])
            self.settled = nn.functional.pad(turned.abs() >= SETTLED, (0, self.count - known))
        self.seen += count
        self._singular, self.components = singular, components

    def shares(self) -> Tensor:
        """Return the share of the rows' variance that each component explains."""
        return self._singular.square() / max(self._total, 1e-30)


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values and right singular vectors, deterministically."""
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
class EvaResult:
    """Result of EVA: the settings of a plain adapter, and A, (r, in), by layer."""

    config: LoraConfig
    matrices: dict[str, Tensor]


@torch.no_grad()
def run_eva(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[dict[str, Tensor]],
    forward: Callable[[dict[str, Tensor]], Any],
    *,
    show: Callable[[int, int], Any] = lambda settled, layers: None,
) -> EvaResult:
    """Return initial matrices and ranks of an adapter, computed from the inputs of its layers.

    The computation stops when all components that get a rank have converged, or at the last batch.
    Layers with the same inputs share a decomposition.

    Args:
        model: the model without the adapter.
        config: config of the adapter, with `init` "eva".
        batches: batches with `attention_mask` (rows, positions), and `labels` if each token has
            one. Masked tokens and tokens with label -100 do not count.
        forward: runs the model on a batch.
        show: gets the numbers of converged and of all decompositions. A no-op by default.

    Raises:
        UserError: no layer is linear, or there is no batch.
    """
    matches = match_targets(model, config)
    linear = [match for match in matches if not isinstance(match.module, nn.Embedding)]
    if not linear:
        raise UserError("lora.init=eva: requires linear layers among lora.targets.")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError("lora.init=eva: requires training rows.")
    source = _shared_inputs(linear, partial(forward, first))
    wanted = {match.name: round(config.eva_rho * match.rank) for match in linear}
    streams = {
        name: StreamedComponents(max(wanted[other] for other in source if source[other] == name))
        for name in dict.fromkeys(source.values())
    }
    budget = sum(match.rank for match in linear if match.name in source)
    ranks: dict[str, int] = {}
    heads = [match for match in linear if match.name in streams]
    for batch in chain([first], iterator):
        _update_streams(heads, streams, batch, forward)
        ranks = distribute_ranks(
            {n: streams[source[n]].shares()[: wanted[n]] for n in source}, budget
        )
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
    return EvaResult(_plain_config(config, matches, ranks), matrices)


def distribute_ranks(shares: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Return how many of the `budget` largest shares each layer has.

    Equal shares go to earlier layers.
    """
    owners = [name for name, values in shares.items() for _ in values]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)
    counts = Counter(owners[place] for place in order[:budget].tolist())
    return {name: counts[name] for name in shares}


def _watch(
    matches: list[Match], see: Callable[[str, Tensor], None], run: Callable[[], Any]
) -> None:
    """Run a pass of the model, and call `see` with the input of each layer."""
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
    """Map each called layer to the first layer that gets the identical tensor."""
    inputs: dict[str, Tensor] = {}  # ranks_by_name alive, so that no id is used twice
    _watch(matches, inputs.__setitem__, run)
    first: dict[int, str] = {}
    return {
        match.name: first.setdefault(id(inputs[match.name]), match.name)
        for match in matches
        if match.name in inputs
    }


def _update_streams(
    matches: list[Match],
    streams: dict[str, StreamedComponents],
    batch: dict[str, Tensor],
    forward: Callable[[dict[str, Tensor]], Any],
) -> None:
    """Run one pass of the model, and update each stream with the inputs of its layer."""

    def see(name: str, inputs: Tensor) -> None:
        streams[name].update(counted_rows(inputs, batch))

    _watch(matches, see, partial(forward, batch))


def counted_rows(inputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the rows of a layer's inputs, (n, in), that belong to tokens that count.

    Inputs are (rows, positions, in), flattened as for a router, or one row as for flash attention.
    All rows of inputs of another shape count, because a pooler sees no padding.
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


def _plain_config(config: LoraConfig, matches: list[Match], ranks: dict[str, int]) -> LoraConfig:
    """Return the config of the same adapter as plain LoRA.

    It lists layers, ranks and alphas by name. Each layer keeps its scaling.
    """
    ranks_by_name = {match.name: ranks.get(match.name, match.rank) for match in matches}
    ranks_by_name = {name: rank for name, rank in ranks_by_name.items() if rank}
    return replace(
        config,
        init="kaiming",
        targets=list(ranks_by_name),
        exclude=[],
        layers=None,
        layers_pattern=None,
        rank_pattern=ranks_by_name,
        alpha_pattern={
            name: config.scaling_of(name) * config.divisor(rank)
            for name, rank in ranks_by_name.items()
        },
    )
