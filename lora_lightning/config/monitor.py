"""Metrics that a run monitors, and whether lower or higher is better."""

from __future__ import annotations

import re

from lora_lightning.errors import UserError
from lora_lightning.utils.checks import check_choice

TEXT_METRICS = ("rouge", "bleu", "chrf")
MONITORS = ("val/loss", "val/accuracy", "val/f1", "val/auroc")
LOWER_IS_BETTER = re.compile(
    r"(^|_)(loss|perplexity|error|distance|divergence|mse|mae|rmse|wer|cer|ter|brier)($|_)"
)
"""Names of metrics for which lower is better. For all others, higher is better."""


def direction_of(monitor: str, mode: str | None = None, setting: str = "task.mode") -> str:
    """Return "max" or "min", whichever is best for a metric.

    Args:
        monitor: name of the metric, such as val/loss.
        mode: direction that the user typed. None (default) means that nothing was typed.
        setting: setting where it was typed (default: task.mode).

    Raises:
        UserError: `mode` is neither, or contradicts the meaning of the metric.
    """
    meant = "min" if LOWER_IS_BETTER.search(monitor.rpartition("/")[2]) else "max"
    if mode is None:
        return meant
    check_choice(setting, mode, ("max", "min"))
    known = meant == "min" or monitor in MONITORS or _is_text_metric(monitor)
    if known and mode != meant:
        raise direction_error(monitor, mode, setting)
    return mode


def direction_error(monitor: str, mode: str, setting: str = "task.mode") -> UserError:
    """Return the error for a direction that would keep the worst state."""
    better = "lower" if mode == "max" else "higher"
    return UserError(
        f"{setting}={mode}: not supported with {monitor}, where {better} is better. Remove "
        f"{setting}."
    )


def _is_text_metric(monitor: str) -> bool:
    return monitor.rpartition("/")[2].startswith(("token_accuracy", *TEXT_METRICS))
