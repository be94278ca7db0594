"""Metrics of generated text, kept as sums and counts.

Ranks with different numbers of rows therefore agree.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.text import BLEUScore, CHRFScore

ROUGE = ("rouge1", "rouge2", "rougeL")


SUMS = torch.float32 if torch.backends.mps.is_available() else torch.float64
"""Type of sums over many tokens. Apple's GPUs have no float64."""


class _MeanPerTarget(Metric):
    """Mean over targets, from sums that are added without waiting for their device.

    torchmetrics 1.9 has MeanMetric. It waits for the device to look for NaN, and drops NaN. With
    nan_strategy="disable" it takes every weight for 1.
    """

    total: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=SUMS), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add a sum over targets and their number."""
        self.total += total.detach().to(self.total)
        self.count += count.to(self.count)

    def compute(self) -> Tensor:
        """Return the mean so far, or nan without any target."""
        return (self.total / self.count).float()


class MeanLoss(_MeanPerTarget):
    """Mean loss per target."""

    higher_is_better = False


class Perplexity(MeanLoss):
    """Exponential of the mean loss per target token."""

    def compute(self) -> Tensor:
        """Return the perplexity so far, or nan without any token."""
        return (self.total / self.count).exp().float()


class TokenAccuracy(_MeanPerTarget):
    """Share of target tokens that the model finds most probable, given all tokens before them."""

    higher_is_better = True


class Rouge(Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 of rouge_score, with stemming, averaged over rows.

    Lin 2004, https://aclanthology.org/W04-1013.
    """

    sums: Tensor
    count: Tensor
    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        from absl import logging as absl_logging
        from rouge_score.rouge_scorer import RougeScorer

        # Importing it puts a handler on the root logger. The handler closes the stderr at import
        # time when logging is set up again.
        handler = absl_logging.get_absl_handler()
        logging.getLogger().removeHandler(handler)
        handler.python_handler.stream = sys.__stderr__
        absl_logging.set_verbosity(absl_logging.WARNING)  # else it reports its tokenizer
        self._scorer = RougeScorer(list(ROUGE), use_stemmer=True)
        self.add_state("sums", torch.zeros(len(ROUGE), dtype=SUMS), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add rows of texts."""
        for prediction, reference in zip(predictions, references, strict=True):
            scores = self._scorer.score(reference, prediction)
            self.sums += torch.tensor([scores[name].fmeasure for name in ROUGE]).to(self.sums)
            self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """Return the means so far, or nan without any row."""
        return dict(zip(ROUGE, (self.sums / self.count).float(), strict=True))


TEXT_METRICS: dict[str, Callable[[], Any]] = {
    "rouge": Rouge,
    "bleu": BLEUScore,
    "chrf": CHRFScore,
}


def text_metrics(names: list[str]) -> dict[str, Metric | MetricCollection]:
    """Return fresh metrics that compare generated texts with references."""
    return {name: TEXT_METRICS[name]() for name in names}
