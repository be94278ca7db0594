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
from lora_lightning.lora.serialization.checksums import SIDECAR

from .files import Stored, key_of, write_like
from .folder import read_sidecar

WHOLE = ("same", "first", "mean")


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
        folders: adapter folders; a single adapter is scaled.
        output: new folder.
        weights: weight of each adapter, negative to subtract; None: the mean of the adapters.
        method: see `lora.arithmetic.combine`.
        rank: rank of the new adapter, if the method takes one; None: the highest input rank.
        density: fraction of entries that ties and dare keep, in (0, 1].
        whole: treatment of fully trained modules (a classifier's head) and biases. "same": they
            must be equal; "first": taken from the first adapter; "mean": weighted mean.
        seed: seed for the entries that dare drops.

    Returns:
        The relative distance of the new adapter from the weighted sum of the updates. It is the
        Frobenius norm of the difference over the norm of the sum, over all layers together. It is
        0 for "cat".

    Raises:
        UserError: an adapter or a value cannot be used; nothing is written in this case.
    """
    if method not in METHODS:
        raise UserError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}."
            f"{did_you_mean(method, METHODS)}"
        )
    if whole not in WHOLE:
        raise UserError(f"whole must be one of {', '.join(WHOLE)}, got {whole!r}.")
    if not 0.0 < density <= 1.0:
        raise UserError(f"density is the share of entries kept, in (0, 1], got {density}.")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}.")
    stored = [Stored.read(Path(folder)) for folder in folders]
    if weights is None:  # ties takes a mean itself
        weights = [1.0 if "ties" in method else 1.0 / len(stored)] * len(stored)
    if len(weights) != len(stored) or not all(map(math.isfinite, weights)):
        raise UserError(f"weights: give a number for each of the {len(stored)} adapters.")
    _check_same_base(stored)
    ranks = [update.lora_A.shape[0] for one in stored for update, _ in one.updates.values()]
    if method == "linear" and len(set(ranks)) > 1:
        raise UserError(
            f"method=linear sums A with A and B with B, which needs one rank, and theirs are "
            f"{', '.join(map(str, sorted(set(ranks))))}: use method=svd or method=cat."
        )
    generator = torch.Generator().manual_seed(seed)
    tensors = _whole_modules(stored, weights, whole)
    new_ranks: dict[str, int] = {}
    missed, total = 0.0, 0.0
    for module in sorted({name for one in stored for name in one.updates}):
        own = [(one, w) for one, w in zip(stored, weights, strict=True) if module in one.updates]
        updates = [one.updates[module][0] for one, _ in own]
        own_weights = [w for _, w in own]
        _check_shapes(module, own)
        new = combine(
            updates,
            own_weights,
            method=method,
            rank=rank or max(ranks),
            density=density,
            generator=generator,
        )
        exact = combine(updates, own_weights, method="cat", rank=0)
        gap = combine([exact, new], [1.0, -1.0], method="cat", rank=0)
        missed += _squares(gap)
        total += _squares(exact)
        a, b = own[0][0].updates[module][1]
        tensors[f"{module}.{a}"], tensors[f"{module}.{b}"] = new.lora_A, new.lora_B
        new_ranks[module] = new.lora_A.shape[0]
    sources = [one.folder for one in stored]
    write_like(sources, Path(output), tensors, _config(stored, new_ranks), by="combine")
    return math.sqrt(missed / total) if total else 0.0


def _squares(update: Update) -> float:
    """Return the squared Frobenius norm of B A, from Gram matrices, in float64."""
    a, b = update.lora_A.double(), update.lora_B.double()
    return max(float(((b.t() @ b) * (a @ a.t())).sum()), 0.0) * update.scaling**2


def _check_shapes(module: str, own: list[tuple[Stored, float]]) -> None:
    shapes = {
        (update.lora_B.shape[0], update.lora_A.shape[1])
        for update in (one.updates[module][0] for one, _ in own)
    }
    if len(shapes) > 1:
        raise UserError(f"{module} has different shapes in these adapters: {sorted(shapes)}.")


def _check_same_base(stored: list[Stored]) -> None:
    """Raise UserError unless the adapters belong to one base, as far as their files show."""
    first = stored[0]
    for other in stored[1:]:
        one, two = (_base_of(item) for item in (first, other))
        known = [key for key in one if one[key] and two[key]]
        for key in known[:1]:  # the fingerprint if both have it, else the name
            if one[key] != two[key]:
                raise UserError(
                    f"{first.folder} and {other.folder} belong to different base models "
                    f"({key} {one[key]} and {two[key]}): their sum would mean nothing."
                )


def _base_of(stored: Stored) -> dict[str, Any]:
    fingerprint = _sidecar(stored).get("base_fingerprint")
    return {"fingerprint": fingerprint, "name": stored.raw.get("base_model_name_or_path")}


def _sidecar(stored: Stored) -> dict[str, Any]:
    return read_sidecar(stored.folder) if (stored.folder / SIDECAR).is_file() else {}


def _tokens_of(stored: Stored) -> list[Any]:
    """Return the new tokens by name, if the folder has them, and the indices of trained rows."""
    model = _sidecar(stored).get("settings", {}).get("model", {})
    return [model.get("new_tokens") or [], stored.raw.get("trainable_token_indices")]


def _whole_modules(stored: list[Stored], weights: Sequence[float], whole: str) -> dict[str, Tensor]:
    first = stored[0].rest
    for other in stored[1:]:
        if _tokens_of(other) != _tokens_of(stored[0]):
            raise UserError(
                f"{stored[0].folder} and {other.folder} have trained rows of different tokens: "
                f"{_tokens_of(stored[0])} and {_tokens_of(other)}. Merge one into the base first."
            )
        if other.rest.keys() != first.keys() or any(
            tensor.shape != other.rest[name].shape for name, tensor in first.items()
        ):
            if whole != "first":
                differing = next(
                    name
                    for name in sorted({*first, *other.rest})
                    if _shape(stored[0], name) != _shape(other, name)
                )
                raise UserError(
                    f"{stored[0].folder} and {other.folder} do not train the same modules whole: "
                    f"{differing} is {_shape(stored[0], differing)} and {_shape(other, differing)}."
                    f"{_counts(stored[0], other, differing)} whole=first takes those of the first."
                )
        elif whole == "same" and any(
            not torch.equal(tensor, other.rest[name]) for name, tensor in first.items()
        ):
            mean = ", whole=mean their mean by the weights" if sum(weights) else ""
            raise UserError(
                f"{stored[0].folder} and {other.folder} each have modules of their own that were "
                f"trained whole ({next(iter(first))}): whole=first takes those of the first{mean}."
            )
    if whole != "mean":
        return dict(first)
    total = sum(weights)
    if total == 0.0:
        raise UserError("whole=mean: the weights add up to zero, use whole=first.")
    return {
        name: torch.stack([w * one.rest[name] for one, w in zip(stored, weights, strict=True)]).sum(
            0
        )
        / total
        for name in first
    }


def _shape(stored: Stored, name: str) -> str:
    return str(tuple(stored.rest[name].shape)) if name in stored.rest else "not there"


def _counts(one: Stored, other: Stored, name: str) -> str:
    """Return a message part on fully trained modules that differ in their number of outputs."""
    if name not in one.rest or name not in other.rest:
        return ""
    first, second = one.rest[name].shape, other.rest[name].shape
    if not first or first[1:] != second[1:]:
        return ""
    return f" They have {first[0]} and {second[0]} outputs: other classes, or other vocabularies."


def _config(stored: list[Stored], ranks: dict[str, int]) -> dict[str, Any]:
    """Return the new adapter_config.json; alpha is the rank, so the scaling is 1 everywhere."""
    targets = [one.raw.get("target_modules") or [] for one in stored]
    keys = {name: key_of(one.config, name) for one in stored for name in one.updates}
    # Short names match all layers. If an adapter covers only some layers, each is named.
    some = ("layers_to_transform", "layers_pattern", "exclude_modules")
    lists = all(isinstance(names, list) for names in targets)
    lists &= not any(one.raw.get(key) for one in stored for key in some)
    common = max(ranks.values())
    pattern = {}
    for name, rank in sorted(ranks.items()):
        if rank != common:
            others = [keys[other] for other, theirs in ranks.items() if theirs != rank]
            pattern[exact_pattern(keys[name], keys[name], others)] = rank
    modules = sorted(name for name, key in keys.items() if name == key)
    exact = any(isinstance(names, str) and names.startswith("^") for names in targets)
    return {
        **stored[0].raw,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": sorted({name for names in targets for name in names})
        if lists
        else (exact_targets(modules) if exact else modules),
        "target_parameters": sorted({p for one in stored for p in one.config.target_parameters})
        or None,
        "modules_to_save": stored[0].raw.get("modules_to_save") or None,
    }
