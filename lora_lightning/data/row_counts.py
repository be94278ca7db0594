"""Warnings about rows of a run that are too few or too uneven."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .datamodule import LoraDataModule

FEW_ROWS = 8
"""Minimum training rows per class. A class with fewer rows can hardly be learned."""
FEW_EVALUATED = 50
"""Minimum validation or test rows. With fewer, one row weighs too much in the metrics."""
IMBALANCE = 3
"""Minimum ratio of the rows of two classes at which they count as imbalanced."""


def class_counts(data: LoraDataModule) -> dict[str, int]:
    """Return the number of training rows per class, or an empty dict if there are no classes."""
    counts = getattr(data.task, "class_counts", None)
    return {} if counts is None else dict(counts(data.raw["train"]))


def row_warnings(data: LoraDataModule) -> list[str]:
    """Return reasons to distrust metrics on these rows, one sentence each."""
    warnings = [
        f"only {_counted(len(rows), f'{split} row')}: each makes {100 / len(rows):.0f} % of the "
        "metrics"
        for split, rows in data.encoded.items()
        if split != "train" and len(rows) < FEW_EVALUATED
    ]
    counts = class_counts(data)
    warnings += [
        f"only {_counted(count, 'training row')} of {label!r}: too few to learn it"
        for label, count in counts.items()
        if count < FEW_ROWS
    ]
    return [*warnings, *_imbalance(counts, data.task.config)]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _imbalance(counts: dict[str, int], config: Any) -> list[str]:
    most = max(counts, key=counts.__getitem__, default="")
    if not counts or counts[most] < IMBALANCE * min(counts.values()):
        return []
    share = counts[most] / sum(counts.values())
    line = f"imbalanced classes: to answer {most!r} always has an accuracy of {share:.2f}"
    if config.monitor == "val/accuracy":
        line += ". val/f1, the macro F1, weighs all classes equally: task.monitor=val/f1"
    return [line]
