"""Fully trained modules and biases of adapters that are combined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lightning.lora import UserError

from .stored_adapter import StoredAdapter


def merge_whole_modules(
    adapters: Sequence[StoredAdapter], weights: Sequence[float], whole: str
) -> dict[str, Tensor]:
    """Return the tensors of fully trained modules and biases; see `combine_adapters`.

    Raises:
        UserError: The adapters do not have the same ones.
    """
    first = adapters[0]
    for other in adapters[1:]:
        _check_tokens(first, other)
        if whole != "first":
            _check_shapes(first, other)
        if whole == "same" and any(
            not torch.equal(tensor, other.rest[name]) for name, tensor in first.rest.items()
        ):
            mean = ", or whole=mean to take the weighted mean" if sum(weights) else ""
            raise UserError(
                f"adapter={first.folder.path},{other.folder.path}: fully trained modules differ "
                f"({next(iter(first.rest))}). Use whole=first to take those of the first{mean}."
            )
    if whole != "mean":
        return dict(first.rest)
    total = sum(weights)
    if total == 0.0:
        raise UserError("whole=mean: weights must not add up to zero. Use whole=first.")
    return {
        name: torch.stack(
            [w * adapter.rest[name] for adapter, w in zip(adapters, weights, strict=True)]
        ).sum(0)
        / total
        for name in first.rest
    }


def _check_tokens(first: StoredAdapter, other: StoredAdapter) -> None:
    if _tokens_of(first) != _tokens_of(other):
        raise UserError(
            f"adapter={first.folder.path},{other.folder.path}: must have trained rows of the same "
            f"tokens, got {_tokens_of(first)} and {_tokens_of(other)}. Merge one into the base "
            "first."
        )


def _tokens_of(adapter: StoredAdapter) -> list[Any]:
    """Return the new tokens by name, if the folder has them, and the indices of trained rows."""
    model = adapter.sidecar().get("settings", {}).get("model", {})
    return [model.get("new_tokens") or [], adapter.raw.get("trainable_token_indices")]


def _check_shapes(first: StoredAdapter, other: StoredAdapter) -> None:
    for name in sorted({*first.rest, *other.rest}):
        one, two = (adapter.rest.get(name) for adapter in (first, other))
        if one is not None and two is not None and one.shape == two.shape:
            continue
        shapes = ["absent" if each is None else str(tuple(each.shape)) for each in (one, two)]
        outputs = ""
        if one is not None and two is not None and one.dim() and one.shape[1:] == two.shape[1:]:
            outputs = f" ({len(one)} and {len(two)} outputs: other classes, or other vocabularies)"
        raise UserError(
            f"adapter={first.folder.path},{other.folder.path}: must have the same fully trained "
            f"modules, but {name} is {shapes[0]} and {shapes[1]}{outputs}. Use whole=first to take "
            "those of the first."
        )
