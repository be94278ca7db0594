"""Copies of the base's embeddings that PEFT stores beside an adapter, compared and dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.lora.layers.trainable_tokens import MATRIX, ROWS
from lora_lightning.lora.model import Adapter


def without_copies(adapter: Adapter, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Drop the copies of frozen base weights that PEFT stores when embeddings are adapted.

    Raises:
        UserError: a copy differs from the model's own weight, so it was resized or trained.
    """
    live = adapter.named_tensors()
    frozen = dict(adapter.model.named_parameters(remove_duplicate=False))
    remaining = _without_row_copies(adapter, tensors, source)
    for name in list(remaining):
        if name not in live and name in frozen:
            _check_copy(remaining.pop(name), frozen[name], name, source)
    return remaining


def _without_row_copies(
    adapter: Adapter, tensors: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Drop the tensors that PEFT stores beside trainable rows if the vocabulary has grown.

    These are the whole matrix of the rows, and a second copy of tied rows. Only the matrix holds
    the new rows that are not trained, so the model takes them from it.
    """
    remaining = dict(tensors)
    before = getattr(adapter.model, "rows_before_growth", None)
    for match in adapter.rows:
        for name in (match.name, *match.tied):
            if name != match.name and f"{name}.{ROWS}" in remaining:
                first = tensors.get(f"{match.name}.{ROWS}", torch.empty(0))
                _check_copy(remaining.pop(f"{name}.{ROWS}"), first, f"{name}.{ROWS}", source)
            weight = adapter.token_rows[name].base_layer.weight.detach()
            copy = remaining.pop(f"{name}.{MATRIX}", weight)
            if copy.shape == weight.shape:
                frozen = torch.ones(len(weight), dtype=torch.bool)
                frozen[match.indices] = False
                added = frozen.clone()
                added[:before] = False
                weight[added] = copy[added].to(weight)
                copy, weight = copy[frozen], weight[frozen]
            _check_copy(copy, weight, f"{name}.{MATRIX}", source)
    return remaining


def _check_copy(stored: Tensor, weight: Tensor, name: str, source: str) -> None:
    """Raise UserError if a copy of a base weight belongs to another base."""
    weight = weight.detach().cpu().float()
    if stored.dim() == 2 and stored.shape[1:] == weight.shape[1:] and len(stored) != len(weight):
        raise UserError(
            f"{source}: {name} has {len(stored)} rows, but the base model's has {len(weight)}. "
            "Load it on the base with the resized vocabulary and the values of its new rows."
        )
    if stored.shape != weight.shape or not torch.allclose(
        stored.cpu().float(), weight, atol=1e-3, rtol=1e-2
    ):
        raise UserError(
            f"{source}: {name} differs from the base model's. It was trained on another base, "
            "with a resized vocabulary, or whole without an entry in modules_to_save."
        )
