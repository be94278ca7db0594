"""Rows to a padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tasks import IGNORE


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
            if isinstance(labels, list):
                batch["labels"] = self._pad(rows, "labels", IGNORE, width)
            else:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
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
