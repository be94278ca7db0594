"""What the rows of a run can tell, and what they are too few or too uneven for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .datamodule import LoraDataModule

FEW_ROWS = 8
"""Training rows of a class from which it can hardly be learned."""
FEW_JUDGES = 50
"""Rows of validation or test from which one makes too much of what is measured."""
UNEVEN = 3
"""Ratio of the rows of two classes from which they are called uneven."""


def class_counts(data: LoraDataModule) -> dict[str, int]:
    """Training rows of each class; empty where the task has no classes."""
    counts = getattr(data.task, "class_counts", None)
    return {} if counts is None else dict(counts(data.raw["train"]))


def doubts(data: LoraDataModule) -> list[str]:
    """What a user should know of the rows before he believes a number: a sentence each."""
    found = [
        f"only {len(rows)} {split} rows: each makes {100 / len(rows):.0f} % of what is measured"
        for split, rows in data.encoded.items()
        if split != "train" and len(rows) < FEW_JUDGES
    ]
    counts = class_counts(data)
    found += [
        f"only {n} training rows of {label!r}: too few to learn it"
        for label, n in counts.items()
        if n < FEW_ROWS
    ]
    return [*found, *_uneven(counts, data.task.config)]


def _uneven(counts: dict[str, int], config: Any) -> list[str]:
    most = max(counts, key=counts.__getitem__, default="")
    if not counts or counts[most] < UNEVEN * min(counts.values()):
        return []
    share = counts[most] / sum(counts.values())
    line = f"uneven classes: the answer {most!r} to all has an accuracy of {share:.2f}"
    if config.monitor == "val/accuracy":
        line += ". val/f1, the macro F1, counts each class alike: task.monitor=val/f1"
    return [line]
