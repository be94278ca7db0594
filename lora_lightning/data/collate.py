"""Rows to a padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tasks import IGNORE


@dataclass
class PackingCollator:
    """Joins rows to one row without padding, whose position ids tell where each begins.

    transformers turns such position ids, where there is no attention mask, into block-diagonal
    attention: no row sees another. The first token of a row is never a target.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in [IGNORE, *row["labels"][1:]]]
        positions = [place for row in rows for place in range(len(row["input_ids"]))]
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.tensor([values]) for name, values in batch.items()}


@dataclass
class PaddingCollator:
    """Pads rows to the longest of the batch; the attention mask goes by position.

    Args:
        pad_token_id: id that fills the end of shorter rows; a row's own tokens of that id stay
            visible.
        padding_side: "right" for training, "left" where a decoder generates.
    """

    pad_token_id: int
    padding_side: str = "right"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": self._pad(rows, "input_ids", self.pad_token_id, width),
            "attention_mask": self._mask(rows, width),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad(rows, "token_type_ids", 0, width)
        if "labels" in rows[0]:
            labels = rows[0]["labels"]
            if isinstance(labels, list):  # of another length than the inputs in encoder-decoders
                longest = max(len(row["labels"]) for row in rows)
                batch["labels"] = self._pad(rows, "labels", IGNORE, longest)
            else:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if "generate" in rows[0]:
            batch["generate"] = torch.tensor([row["generate"] for row in rows])
        return batch

    def _pad(self, rows: list[dict[str, Any]], name: str, value: int, width: int) -> Tensor:
        out = torch.full((len(rows), width), value, dtype=torch.long)
        for index, row in enumerate(rows):
            out[index, self._place(len(row[name]), width)] = torch.tensor(row[name])
        return out

    def _mask(self, rows: list[dict[str, Any]], width: int) -> Tensor:
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            mask[index, self._place(len(row["input_ids"]), width)] = 1
        return mask

    def _place(self, length: int, width: int) -> slice:
        return slice(width - length, width) if self.padding_side == "left" else slice(0, length)
