"""Embeddings and output layer of a model of transformers, made to hold more tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .config import LoraConfig
from .layers.trainable_tokens import MATRIX
from .rng import fork_rng

MOST_NEW = 2**16
"""Rows by which a file may let a vocabulary grow: it may name any index, and memory is finite."""


def vocabulary_rows(model: nn.Module) -> int:
    """Rows of the input embedding; often more than there are tokens."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


@torch.no_grad()
def grow(model: nn.Module, rows: int) -> None:
    """Gives embeddings and output layer at least so many rows; they never lose any.

    New rows (of the output layer's bias too) are the mean of those there were, to which
    transformers adds noise of 1e-9 of their covariance: here the same base always grows to the
    same. `rows_before_growth` of the model says how many rows it had.

    Raises:
        UserError: it is no model of transformers, or one whose vocabulary cannot grow.
    """
    resize: Any = getattr(model, "resize_token_embeddings", None)
    if resize is None:
        raise UserError(f"the vocabulary of a {type(model).__name__} cannot grow to {rows} rows.")
    before = vocabulary_rows(model)
    if rows <= before:
        return
    try:
        with fork_rng(next(model.parameters()).device):
            resize(rows, mean_resizing=False)
    except NotImplementedError as error:
        raise UserError(
            f"a {type(model).__name__} does not let its vocabulary grow: {error}"
        ) from None
    for tensor in _matrices(model):
        if tensor.shape[0] == rows:
            tensor[before:] = tensor[:before].mean(0, dtype=torch.float32).to(tensor.dtype)
    if not hasattr(model, "rows_before_growth"):
        model.rows_before_growth = before  # type: ignore[assignment]


def make_room(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: str | Path
) -> None:
    """Lets the model's vocabulary grow to the rows that the adapter's tokens need."""
    rows = rows_needed(config, tensors)
    if not rows or not hasattr(model, "resize_token_embeddings"):
        return
    if rows > vocabulary_rows(model) + MOST_NEW:
        raise UserError(
            f"{source} trains the row of index {rows - 1}, and the base model has "
            f"{vocabulary_rows(model)} rows: it is not the one that the adapter is for."
        )
    grow(model, rows)


def rows_needed(config: LoraConfig, tensors: dict[str, Tensor]) -> int:
    """Rows of the vocabulary that an adapter's trained rows need; 0 where it has none."""
    asked = config.trainable_token_indices or {}
    lists = asked.values() if isinstance(asked, dict) else [asked]
    copies = [len(tensor) for name, tensor in tensors.items() if name.endswith(f".{MATRIX}")]
    return max([*(1 + max(indices) for indices in lists), *copies], default=0)


def before_growth(model: nn.Module) -> dict[Tensor, Tensor]:
    """For each parameter that `grow` has made longer, the part of it that was there before."""
    before = getattr(model, "rows_before_growth", None)
    if before is None:
        return {}
    return {p: p[:before] for p in _matrices(model) if p.shape[0] > before}


def _matrices(model: Any) -> list[nn.Parameter]:
    """Parameters of the embeddings and the output layer, each once."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(dict.fromkeys(p for end in ends if end is not None for p in end.parameters()))
