"""Growth of the embeddings and output layer of a transformers model for more tokens."""

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
"""Maximum number of rows by which a file may grow a vocabulary.

A file may name any index, and memory is finite.
"""


def vocabulary_rows(model: nn.Module) -> int:
    """Return the number of rows of the input embedding, often more than there are tokens."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


@torch.no_grad()
def grow(model: nn.Module, rows: int) -> None:
    """Grow embeddings and output layer to at least `rows` rows, without removing any.

    New rows are the mean of the existing rows, also in the output layer's bias. transformers adds
    noise of 1e-9 of their covariance. This function adds none, so the same base always grows to
    the same values. The model's `rows_before_growth` holds the original number of rows.

    Raises:
        UserError: it is not a transformers model, or its vocabulary cannot grow.
    """
    resize: Any = getattr(model, "resize_token_embeddings", None)
    if resize is None:
        raise UserError(f"a {type(model).__name__} does not support a vocabulary of {rows} rows.")
    before = vocabulary_rows(model)
    if rows <= before:
        return
    try:
        with fork_rng(next(model.parameters()).device):
            resize(rows, mean_resizing=False)
    except NotImplementedError as error:
        raise UserError(
            f"a {type(model).__name__} does not support a larger vocabulary: {error}"
        ) from None
    for tensor in _matrices(model):
        if tensor.shape[0] == rows:
            tensor[before:] = tensor[:before].mean(0, dtype=torch.float32).to(tensor.dtype)
    if not hasattr(model, "rows_before_growth"):
        model.rows_before_growth = before  # type: ignore[assignment]


def make_room(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], source: str | Path
) -> None:
    """Grow the model's vocabulary to the rows that the adapter's tokens need."""
    rows = rows_needed(config, tensors)
    if not rows or not hasattr(model, "resize_token_embeddings"):
        return
    if rows > vocabulary_rows(model) + MOST_NEW:
        raise UserError(
            f"{source} requires the row of index {rows - 1}, but the base model has "
            f"{vocabulary_rows(model)} rows. Was the adapter trained on another base model?"
        )
    grow(model, rows)


def rows_needed(config: LoraConfig, tensors: dict[str, Tensor]) -> int:
    """Return how many vocabulary rows an adapter's trained rows need, or 0 if it has none."""
    indices = config.trainable_token_indices or {}
    lists = indices.values() if isinstance(indices, dict) else [indices]
    copies = [len(tensor) for name, tensor in tensors.items() if name.endswith(f".{MATRIX}")]
    return max([*(1 + max(ids) for ids in lists), *copies], default=0)


def before_growth(model: nn.Module) -> dict[Tensor, Tensor]:
    """Return the original part of each parameter that `grow` has extended."""
    before = getattr(model, "rows_before_growth", None)
    if before is None:
        return {}
    return {p: p[:before] for p in _matrices(model) if p.shape[0] > before}


def _matrices(model: Any) -> list[nn.Parameter]:
    """Return the parameters of the embeddings and the output layer, each once."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(dict.fromkeys(p for end in ends if end is not None for p in end.parameters()))
