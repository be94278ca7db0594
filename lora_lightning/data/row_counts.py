"""Warnings about rows of a run that are too few or too uneven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .datamodule import LoraDataModule

FEW_ROWS = 8
"""Minimum training rows per class. A class with fewer rows can hardly be learned."""
FEW_JUDGES = 50
"""Minimum validation or test rows. With fewer, one row weighs too much in the metrics."""
UNEVEN = 3
"""Minimum ratio of the rows of two classes at which they count as uneven."""


def class_counts(data: LoraDataModule) -> dict[str, int]:
    """Return the number of training rows per class, or an empty dict if there are no classes."""
    counts = getattr(data.task, "class_counts", None)
    return {} if counts is None else dict(counts(data.raw["train"]))


def doubts(data: LoraDataModule) -> list[str]:
    """Return reasons to distrust metrics on these rows, one sentence each."""
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
