"""Encoded rows by index, and limits of their length and of the tokens in a batch."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from lora_lightning.config.schema import DataConfig
from lora_lightning.errors import UserError
from lora_lightning.tasks import IGNORE

from .sampler import FILLER

CPU_TOKENS = 1024
"""Default number of tokens computed at a time on a CPU. See experiments/throughput."""


class Examples(Dataset[dict[str, Any]]):
    """Dataset of encoded rows by index. `FILLER` gives the first row without its labels."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch, read at once."""
        if FILLER in indices:
            return [self[index] for index in indices]
        columns = self.rows[indices]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != FILLER:
            return dict(self.rows[index])
        row = dict(self.rows[0])
        labels = row["labels"]
        row["labels"] = [IGNORE] * len(labels) if isinstance(labels, list) else IGNORE
        if "generate" in row:
            row["generate"] = False
        return row


def highest_ids(encoded: Any) -> list[int]:
    """Return the highest token id of the inputs, and of the labels if they are tokens."""
    import pyarrow.compute as pc

    columns = [encoded.data.column(name) for name in ("input_ids", "labels")]
    lists = [column for column in columns if hasattr(column.type, "value_type")]
    found = [pc.max(pc.list_flatten(column)).as_py() for column in lists]
    return [number for number in found if number is not None]


def mark_rows_to_generate(encoded: Any, count: int) -> Any:
    """Mark evenly spaced rows to generate text for."""
    total = len(encoded)
    count = total if count == -1 else min(count, total)
    chosen = {index * total // count for index in range(count)}
    return encoded.add_column("generate", [index in chosen for index in range(total)])


def longest_input(config: DataConfig, model: int | None, tokenizer: int | None = None) -> int:
    """Return the length limit of an example in tokens.

    Args:
        config: settings with the requested limit.
        model: longest input that the model takes. None means unlimited.
        tokenizer: longest input that the tokenizer takes. None (default) means unlimited.

    Raises:
        UserError: the requested limit is longer than the model takes.
    """
    asked = config.max_length
    if asked is None:
        return min(model or 512, tokenizer or 512, 512)
    if model is not None and asked > model:
        raise UserError(f"data.max_length={asked}: must be at most {model}, the model's limit.")
    return asked


def tokens_at_a_time(config: DataConfig, device_type: str) -> int | None:
    """Return the number of tokens computed at a time on a device, or None for whole batches."""
    if config.max_tokens != "auto":
        return config.max_tokens  # type: ignore[no-any-return]
    return CPU_TOKENS if device_type == "cpu" else None
