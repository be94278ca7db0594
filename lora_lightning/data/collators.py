"""Collators from rows to one padded batch, or to several micro-batches of bounded size."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lightning.tasks import IGNORE, Task


@dataclass
class Located:
    """Collator that adds the task's counts on the host.

    In a worker process, counting costs the training process nothing. The counts are pinned with
    the rest of the batch.

    Args:
        collator: collator that makes one batch or several micro-batches of the rows.
        task: task whose `locate` adds the counts.
    """

    collator: MicroBatches | PaddingCollator | PackingCollator
    task: Task

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collator(rows)
        if isinstance(batch, list):
            return [self.task.locate(part) for part in batch]
        return self.task.locate(batch)


@dataclass
class MicroBatches:
    """Collator to micro-batches of at most `max_tokens` tokens, including padding.

    The memory of a step then depends on `max_tokens`, and not on the rows that happen to meet in a
    batch. Rows of similar length are grouped, which reduces padding. A row longer than
    `max_tokens` forms its own micro-batch.

    Args:
        collator: collator that makes a batch of rows.
        max_tokens: largest rows x positions of a micro-batch.
    """

    collator: PaddingCollator | PackingCollator
    max_tokens: int

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(self.collator, PackingCollator):
            lanes = self.collator.lanes(rows)
            width = self.collator.rounded(max(map(_filled, lanes)))
            count = max(1, self.max_tokens // width)
            groups = (lanes[start : start + count] for start in range(0, len(lanes), count))
            return [self.collator.join(group) for group in groups]
        rows = sorted(rows, key=_width, reverse=True)
        widths = [self.collator.rounded(_width(row)) for row in rows]
        cuts = _cuts(widths, self.max_tokens)
        return [self.collator(rows[start:stop]) for start, stop in pairwise(cuts)]


PART_COST = 128
"""Cost of a micro-batch in tokens, beyond its own tokens. It stands for the lower efficiency of
smaller products and for overhead."""


def _cuts(widths: list[int], max_tokens: int) -> list[int]:
    """Return the cuts between micro-batches that minimize computation.

    Rows are sorted longest first. The cuts are indices from 0 to the number of rows.
    """
    costs, starts = [0.0], [0]
    for stop in range(1, len(widths) + 1):
        fitting = [
            start
            for start in range(stop)
            if stop - start == 1 or (stop - start) * widths[start] <= max_tokens
        ]
        cost, start = min(
            (costs[start] + (stop - start) * widths[start] + PART_COST, start) for start in fitting
        )
        costs.append(cost)
        starts.append(start)
    cuts = [len(widths)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    return cuts[::-1]


def _width(row: dict[str, Any]) -> int:
    """Return the length of a row's inputs, or of its labels if an encoder-decoder has more."""
    labels = row.get("labels")
    return max(len(row["input_ids"]), len(labels) if isinstance(labels, list) else 0)


LANE = 512
"""Positions of a lane of packed rows, unless a row is longer."""


@dataclass
class PackingCollator:
    """Collator that packs rows into a few long lanes.

    Position ids mark where each row begins. Without an attention mask, transformers turns such
    position ids into block-diagonal attention, so no row sees another. The first token of a row is
    never a target. Rows go, in their order, into the first lane with room. The free end of a lane
    is padded.

    `rows` and `tokens` are the numbers of rows and tokens, without padding. A block of documents
    counts as many rows.

    Flash attention takes `bounds` (int32) instead of position ids. The lanes are concatenated, and
    `bounds` holds the start of each row, the start of each lane's padding, and the end. `longest`
    is the length of the longest of these segments.

    Args:
        pad_token_id: id that fills the end of a lane (default: 0).
        width: length of a lane, unless a row is longer (default: 512). None puts all rows into one
            lane. Attention costs the square of the width if the kernel computes masked positions.
        multiple: lane lengths are rounded up to a multiple of this number (default: 1).
    """

    pad_token_id: int = 0
    width: int | None = LANE
    multiple: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.join(self.lanes(rows))

    def lanes(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return the rows of each lane."""
        if self.width is None:
            return [rows]
        room = max(self.width, *(len(row["input_ids"]) for row in rows))
        lanes: list[list[dict[str, Any]]] = []
        free: list[int] = []
        for row in rows:
            length = len(row["input_ids"])
            index = next((i for i, left in enumerate(free) if left >= length), len(lanes))
            if index == len(lanes):
                lanes.append([])
                free.append(room)
            lanes[index].append(row)
            free[index] -= length
        return lanes

    def join(self, lanes: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Return the batch of some lanes, padded to the longest lane."""
        width = self.rounded(max(map(_filled, lanes)))
        shape = len(lanes), width
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        places = np.zeros(shape, dtype=np.int64)
        bounds: list[int] = []
        rows = 0
        for number, lane in enumerate(lanes):
            start = 0
            for row in lane:
                stop = start + len(row["input_ids"])
                ids[number, start:stop] = row["input_ids"]
                labels[number, start + 1 : stop] = row["labels"][1:]
                # A row that already joins several documents has its own position ids.
                places[number, start:stop] = row.get("position_ids") or np.arange(stop - start)
                start = stop
            starts = np.flatnonzero(places[number, :start] == 0) + number * width
            rows += len(starts)
            bounds += starts.tolist() + ([number * width + start] if start < width else [])
        bounds.append(len(lanes) * width)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(places),
            "bounds": torch.from_numpy(np.array(bounds, dtype=np.int32)),
            "longest": max(stop - start for start, stop in pairwise(bounds)),
            "rows": rows,
            "tokens": sum(map(_filled, lanes)),
        }

    def rounded(self, width: int) -> int:
        """Return the padded length of a batch whose longest lane has `width` positions."""
        return -(-width // self.multiple) * self.multiple


def _filled(lane: list[dict[str, Any]]) -> int:
    """Return the number of positions that a lane's rows take."""
    return sum(len(row["input_ids"]) for row in lane)


@dataclass
class PaddingCollator:
    """Collator that pads rows to the longest row of the batch.

    The attention mask depends on positions, not on token ids. `generate` marks the rows to generate
    text for. It stays a list, so that reading it waits for no device.

    Args:
        pad_token_id: id that fills the end of shorter rows. A row's own tokens with this id stay
            visible.
        padding_side: "right" (default) for training, "left" if a decoder generates.
        multiple: row lengths are rounded up to a multiple of this number (default: 1).
        limit: longest input that the model takes. None (default) means unlimited.
    """

    pad_token_id: int
    padding_side: str = "right"
    multiple: int = 1
    limit: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = self.rounded(max(len(row["input_ids"]) for row in rows))
        batch: dict[str, Any] = {
            "input_ids": self._pad(rows, "input_ids", self.pad_token_id, width),
            "attention_mask": self._mask(rows, width),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad(rows, "token_type_ids", 0, width)
        if "labels" in rows[0]:
            labels = rows[0]["labels"]
            if isinstance(labels, list):  # length differs from inputs in encoder-decoders
                longest = self.rounded(max(len(row["labels"]) for row in rows))
                batch["labels"] = self._pad(rows, "labels", IGNORE, longest)
            else:
                batch["labels"] = torch.tensor([row["labels"] for row in rows], device="cpu")
        if "generate" in rows[0]:
            batch["generate"] = [bool(row["generate"]) for row in rows]
        return batch

    def rounded(self, width: int) -> int:
        """Return the padded length of a batch whose longest row has `width` positions."""
        rounded = -(-width // self.multiple) * self.multiple
        return rounded if self.limit is None else min(rounded, max(width, self.limit))

    def _pad(self, rows: list[dict[str, Any]], name: str, value: int, width: int) -> Tensor:
        out = np.full((len(rows), width), value, dtype=np.int64)
        for index, row in enumerate(rows):
            out[index, self._place(len(row[name]), width)] = row[name]
        return torch.from_numpy(out)

    def _mask(self, rows: list[dict[str, Any]], width: int) -> Tensor:
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for index, row in enumerate(rows):
            mask[index, self._place(len(row["input_ids"]), width)] = 1
        return torch.from_numpy(mask)

    def _place(self, length: int, width: int) -> slice:
        return slice(width - length, width) if self.padding_side == "left" else slice(0, length)
