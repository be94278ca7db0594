"""Rows to a padded batch, or to several of bounded size."""

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
    """Collates rows, and adds what the task counts on the host.

    In a worker process it costs the training process nothing, and is pinned with the rest.

    Args:
        collator: makes a batch of rows, or micro-batches.
        task: counts.
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
    """Collates rows to micro-batches of at most `max_tokens` tokens, padding counted.

    What a step needs in memory then depends on that number and no longer on the rows that happen to
    meet in a batch. Rows of like length go together, so less is padded. A row longer than
    `max_tokens` goes alone.

    Args:
        collator: makes a batch of rows.
        max_tokens: rows x positions of a micro-batch.
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
"""Tokens that a micro-batch costs beside its own: what its products lack in size, and overhead."""


def _cuts(widths: list[int], max_tokens: int) -> list[int]:
    """Where to cut rows, longest first, for the least to compute: 0, ..., number of rows."""
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
    """Positions of a row: of its inputs, or of its labels where an encoder-decoder has more."""
    labels = row.get("labels")
    return max(len(row["input_ids"]), len(labels) if isinstance(labels, list) else 0)


LANE = 512
"""Positions of a lane of joined rows, unless a row is longer."""


@dataclass
class PackingCollator:
    """Joins rows to a few long ones, whose position ids tell where each begins.

    transformers turns such position ids, where there is no attention mask, into block-diagonal
    attention: no row sees another. The first token of a row is never a target. Rows are put, in
    their order, into the first lane that has room; what stays empty at a lane's end is padded.

    `rows` and `tokens` are their numbers, without padding; a block of documents has many rows.

    Flash attention takes `bounds` instead: where each row begins, and the padding of a lane, in all
    lanes one behind the other, and the end (int32). The longest of these stretches is `longest`.

    Args:
        pad_token_id: id that fills the end of a lane.
        width: length of a lane, unless a row is longer; None: one lane holds all rows. Attention
            costs its square where the kernel masks what it has computed.
        multiple: lanes are filled up to a multiple of it.
    """

    pad_token_id: int = 0
    width: int | None = LANE
    multiple: int = 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.join(self.lanes(rows))

    def lanes(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The rows of each lane."""
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
        """The batch of some lanes, as long as the longest of them."""
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
                # A row has its own where it is joined of several already.
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
        """Positions of a batch whose longest lane has so many."""
        return -(-width // self.multiple) * self.multiple


def _filled(lane: list[dict[str, Any]]) -> int:
    """Positions of a lane's rows."""
    return sum(len(row["input_ids"]) for row in lane)


@dataclass
class PaddingCollator:
    """Pads rows to the longest of the batch; the attention mask goes by position.

    What tells which rows text is generated for stays a list: no device has to be waited for.

    Args:
        pad_token_id: id that fills the end of shorter rows; a row's own tokens of that id stay
            visible.
        padding_side: "right" for training, "left" where a decoder generates.
        multiple: rows are filled up to a multiple of it.
        limit: longest input that the model takes, None if unlimited.
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
            if isinstance(labels, list):  # of another length than the inputs in encoder-decoders
                longest = self.rounded(max(len(row["labels"]) for row in rows))
                batch["labels"] = self._pad(rows, "labels", IGNORE, longest)
            else:
                batch["labels"] = torch.tensor([row["labels"] for row in rows], device="cpu")
        if "generate" in rows[0]:
            batch["generate"] = [bool(row["generate"]) for row in rows]
        return batch

    def rounded(self, width: int) -> int:
        """Positions of a batch whose longest row has so many."""
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
