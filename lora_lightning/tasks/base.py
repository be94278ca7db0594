"""What a task is: how rows become examples, what the loss is, what is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import MetricCollection

from ..lora.errors import UserError, did_you_mean
from ..settings import ModelConfig

IGNORE = -100
"""Label of a position or row that takes no part in loss and metrics."""


@dataclass
class LossOutput:
    """What a task's loss gives for a batch."""

    total: Tensor
    """Loss summed over targets, a scalar with a graph."""
    count: Tensor
    """Number of targets, a scalar: `total / count` is the mean."""
    outputs: Tensor
    """What metrics and predictions are made from."""


class Task(ABC):
    """A task turns rows into examples, says what the loss is, and what is measured.

    One object serves a run: the data module has it learn the labels from the data and encode rows,
    the LightningModule asks it for the model, the loss and the metrics.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str]
    config: Any
    """The task's settings, a dataclass with at least `name`, `monitor` and `mode`."""

    @abstractmethod
    def learn(self, splits: dict[str, Any]) -> None:
        """Settles columns and labels from the data: `splits` are datasets of raw rows by name.

        Raises:
            UserError: a column or label is unknown or missing.
        """

    @abstractmethod
    def encode(self, rows: dict[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, Any]:
        """Turns raw rows (column -> values) into lists of `input_ids`, `labels`, `truncated`...

        A row with nothing to learn from gets an empty `input_ids`; the data module drops and
        counts it.
        """

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """All that `encode` depends on, as plain values: the key of the tokenised cache."""

    @abstractmethod
    def strata(self, raw: Any) -> list[Any] | None:
        """A key for each row of which every made split gets its share, or None."""

    @abstractmethod
    def build_model(self, config: ModelConfig, tokenizer: Any) -> tuple[nn.Module, list[str]]:
        """The base model in train mode, and the names of the modules to train whole."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> LossOutput:
        """The loss over a batch: the one place that decides what is learned."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh metrics, to be fed by `update_metrics`."""

    @abstractmethod
    def update_metrics(
        self, metrics: MetricCollection, output: LossOutput, batch: dict[str, Tensor]
    ) -> None:
        """Adds a batch to the metrics."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Readable predictions, one dict for each row of a batch."""

    @abstractmethod
    def find_inputs(self, columns: list[str]) -> None:
        """Settles which of a file's columns are the inputs of a prediction.

        Raises:
            UserError: they are not there.
        """

    @abstractmethod
    def input_columns(self) -> list[str]:
        """Columns that a prediction needs, the main one first."""

    @abstractmethod
    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        """A raw row as readable text: its `input` and its `target`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `learn` settled, as plain values, to be stored with the adapter."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave: an adapter then needs no training data."""


def pick_column(
    asked: str | None, candidates: Sequence[str], columns: Sequence[str], option: str
) -> str | None:
    """The column that the user named, or else the first candidate that exists (None: no such).

    Raises:
        UserError: the named column does not exist.
    """
    if asked is not None:
        if asked not in columns:
            raise UserError(
                f"{option}={asked}: the data has no such column.{did_you_mean(asked, columns)} "
                f"Its columns are {', '.join(columns)}."
            )
        return asked
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in candidates if name in by_lower), None)
