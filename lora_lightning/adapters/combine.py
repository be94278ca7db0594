"""Combination of adapters of one base into a new adapter: `lora-lightning combine`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import did_you_mean
from lora_lightning.lora import UserError
from lora_lightning.lora.arithmetic import METHODS, Update, combine
from lora_lightning.lora.name_patterns import exact_pattern, exact_targets

from .combine_modules import merge_whole_modules
from .stored_adapter import StoredAdapter, key_of, write_like

WHOLE = ("same", "first", "mean")
"""Treatments of fully trained modules."""


def combine_adapters(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    rank: int | None = None,
    density: float = 0.5,
    whole: str = "same",
    seed: int = 0,
) -> float:
    """Write a new adapter that combines others of the same base model.

    The other files of the first folder (tokenizer, settings of the task) are copied to the new one.

    Args:
        folders: Adapter folders. A single adapter is scaled.
        output: New folder.
        weights: Weight of each adapter, negative to subtract. Defaults to None, the mean of the
            adapters.
        method: See `lora.arithmetic.combine`. Defaults to "cat".
        rank: Rank of the new adapter, if the method takes one. Defaults to None, the highest input
            rank.
        density: Fraction of entries that ties and dare keep, in (0, 1]. Defaults to 0.5.
        whole: Treatment of fully trained modules (a classifier's head) and biases. "same" requires
            equal ones, "first" takes those of the first adapter, and "mean" takes the weighted
            mean. Defaults to "same".
        seed: Seed for the entries that dare drops. Defaults to 0.

    Returns:
        `relative_error` of the new adapter.

    Raises:
        UserError: An adapter or a value cannot be used. Nothing is written in this case.
    """
    _check_options(method, rank, density, whole)
    adapters = [StoredAdapter.read(folder) for folder in folders]
    if weights is None:  # ties takes a mean itself
        weights = [1.0 if "ties" in method else 1.0 / len(adapters)] * len(adapters)
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise UserError(f"weights: must be a number for each of the {len(adapters)} adapters.")
    _check_same_base(adapters)
    _check_ranks(adapters, method)
    modules = merge_whole_modules(adapters, weights, whole)
    updates = merge_updates(adapters, weights, method, rank=rank, density=density, seed=seed)
    options = {"method": method, "rank": rank, "density": density, "whole": whole, "seed": seed}
    words = [
        "combine",
        f"adapter={','.join(map(str, folders))}",
        f"weights={','.join(map(str, weights))}",
        *(f"{name}={value}" for name, value in options.items() if value is not None),
    ]
    write(adapters, updates, modules, output, command=words)
    return relative_error(adapters, weights, updates)


def merge_updates(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    method: str,
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Update]:
    """Return the combined update of each module, by its name; see `combine_adapters`."""
    generator = torch.Generator().manual_seed(seed)
    highest = max(
        update.lora_A.shape[0] for adapter in adapters for update, _ in adapter.updates.values()
    )
    return {
        module: combine(
            *_updates_of(module, adapters, weights),
            method=method,
            rank=rank or highest,
            density=density,
            generator=generator,
        )
        for module in sorted({name for adapter in adapters for name in adapter.updates})
    }


def relative_error(
    adapters: Sequence[StoredAdapter], weights: Sequence[float], updates: dict[str, Update]
) -> float:
    """Return the relative distance of updates from the weighted sum of the adapters' updates.

    It is the Frobenius norm of the difference over the norm of the sum, over all modules together.
    It is 0 for "cat".
    """
    missed, total = 0.0, 0.0
    for module, update in updates.items():
        exact = combine(*_updates_of(module, adapters, weights), method="cat", rank=0)
        missed += _squares(combine([exact, update], [1.0, -1.0], method="cat", rank=0))
        total += _squares(exact)
    return math.sqrt(missed / total) if total else 0.0


def write(
    adapters: Sequence[StoredAdapter],
    updates: dict[str, Update],
    modules: dict[str, Tensor],
    output: str | Path,
    *,
    command: Sequence[str],
) -> None:
    """Write combined updates and fully trained modules as an adapter folder.

    Args:
        adapters: Adapters that were combined. The first gives the other files.
        updates: Update of each adapted module, with scaling 1.
        modules: Tensors of fully trained modules and biases.
        output: New folder.
        command: Words of the command that combines them, for the model card.
    """
    tensors = dict(modules)
    for module, update in updates.items():
        a, b = next(adapter.updates[module][1] for adapter in adapters if module in adapter.updates)
        tensors[f"{module}.{a}"], tensors[f"{module}.{b}"] = update.lora_A, update.lora_B
    ranks = {module: update.lora_A.shape[0] for module, update in updates.items()}
    folders = [adapter.folder for adapter in adapters]
    write_like(folders, output, tensors, _config(adapters, ranks), command=command)


def _updates_of(
    module: str, adapters: Sequence[StoredAdapter], weights: Sequence[float]
) -> tuple[list[Update], list[float]]:
    """Return the updates that adapters have for a module, and their weights."""
    pairs = [
        (adapter.updates[module][0], weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if module in adapter.updates
    ]
    shapes = {(update.lora_B.shape[0], update.lora_A.shape[1]) for update, _ in pairs}
    if len(shapes) > 1:
        raise UserError(f"{module}: must have one shape in all adapters, got {sorted(shapes)}.")
    return [update for update, _ in pairs], [weight for _, weight in pairs]


def _squares(update: Update) -> float:
    """Return the squared Frobenius norm of B A, from Gram matrices, in float64."""
    a, b = update.lora_A.double(), update.lora_B.double()
    return max(float(((b.t() @ b) * (a @ a.t())).sum()), 0.0) * update.scaling**2


def _check_options(method: str, rank: int | None, density: float, whole: str) -> None:
    for name, value, known in (("method", method, METHODS), ("whole", whole, WHOLE)):
        if value not in known:
            raise UserError(
                f"{name}={value}: must be one of {', '.join(known)}.{did_you_mean(value, known)}"
            )
    if not 0.0 < density <= 1.0:
        raise UserError(f"density={density}: must be in (0, 1], the share of entries to keep.")
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank}: must be at least 1.")


def _check_same_base(adapters: Sequence[StoredAdapter]) -> None:
    """Raise UserError unless the adapters belong to one base, as far as their files show."""
    first = adapters[0]
    for other in adapters[1:]:
        one, two = _base_of(first), _base_of(other)
        known = [key for key in one if one[key] and two[key]]
        for key in known[:1]:  # the fingerprint if both have it, else the name
            if one[key] != two[key]:
                raise UserError(
                    f"adapter={first.folder.path},{other.folder.path}: must belong to one base "
                    f"model, got {key} {one[key]} and {two[key]}."
                )


def _base_of(adapter: StoredAdapter) -> dict[str, Any]:
    fingerprint = adapter.sidecar().get("base_fingerprint")
    return {"fingerprint": fingerprint, "name": adapter.raw.get("base_model_name_or_path")}


def _check_ranks(adapters: Sequence[StoredAdapter], method: str) -> None:
    """Raise UserError for method=linear with different ranks."""
    ranks = {
        update.lora_A.shape[0] for adapter in adapters for update, _ in adapter.updates.values()
    }
    if method == "linear" and len(ranks) > 1:
        raise UserError(
            f"method=linear: requires one rank, got {', '.join(map(str, sorted(ranks)))}. "
            "Use method=svd or method=cat."
        )


def _config(adapters: Sequence[StoredAdapter], ranks: dict[str, int]) -> dict[str, Any]:
    """Return the new adapter_config.json; alpha is the rank, so the scaling is 1 everywhere."""
    keys = {name: key_of(adapter.config, name) for adapter in adapters for name in adapter.updates}
    common = max(ranks.values())
    pattern = {}
    for name, rank in sorted(ranks.items()):
        if rank != common:
            others = [keys[other] for other, its_rank in ranks.items() if its_rank != rank]
            pattern[exact_pattern(keys[name], keys[name], others)] = rank
    modules = sorted(name for name, key in keys.items() if name == key)
    parameters = {name for adapter in adapters for name in adapter.config.target_parameters}
    return {
        **adapters[0].raw,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": _targets(adapters, modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": adapters[0].raw.get("modules_to_save") or None,
    }


def _targets(adapters: Sequence[StoredAdapter], modules: list[str]) -> list[str] | str:
    """Return the target modules of the new adapter.

    Short names match all layers. If an adapter covers only some layers, each module is named.
    """
    targets = [adapter.raw.get("target_modules") or [] for adapter in adapters]
    keys = ("layers_to_transform", "layers_pattern", "exclude_modules")
    limited = any(adapter.raw.get(key) for adapter in adapters for key in keys)
    if not limited and all(isinstance(names, list) for names in targets):
        return sorted({name for names in targets for name in names})
    exact = any(isinstance(names, str) and names.startswith("^") for names in targets)
    return exact_targets(modules) if exact else modules
