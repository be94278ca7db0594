"""What a task is: how rows become examples, what the loss is, what is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.sharded_loading import Shards
from lora_lightning.errors import UserError, did_you_mean

IGNORE = -100
"""Label of a position or row that takes no part in loss and metrics."""


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch whose tensors are on a device; its numbers stay as they are."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


@dataclass
class LossOutput:
    """What a task's loss gives for a batch."""

    total: Tensor
    """Loss summed over targets, a scalar with a graph."""
    count: Tensor
    """Number of targets, a scalar: `total / count` is the mean."""
    outputs: Tensor | None
    """What `update_metrics` needs beside them; it may be missing while the model is training."""


class Task(ABC):
    """A task turns rows into examples, says what the loss is, and what is measured.

    One object serves a run: the data module has it learn the labels from the data and encode rows,
    the LightningModule asks it for the model, the loss and the metrics.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    """The metric, beside the loss, that the progress bar has room for."""
    peft_task_type: str
    dropped_means: ClassVar[str] = "empty text"
    """Why a row has nothing to learn."""
    dropped_advice: ClassVar[str] = "Name the column with the text: task.text_column=NAME."
    """What to do where no row has anything to learn."""
    notes: Sequence[str] = ()
    """What a user is told once `learn` is done."""
    is_told: Callable[[], bool] | None = None
    """Whether the run is told to end, so that what `finish_epoch` does comes to nothing."""
    config: Any
    """The task's settings, a dataclass with at least `name`, `monitor` and `mode`."""

    def prepare(self, model_config: Any) -> None:  # noqa: B027, most tasks suit any model
        """Takes note of the model's transformers config, before any row is encoded.

        Raises:
            UserError: the task cannot be learned by that kind of model.
        """

    def begin_with(self, state: dict[str, Any], source: str) -> None:  # noqa: B027
        """Takes note of the task's `state` in a run whose values this one begins with.

        Args:
            state: of a task of any kind.
            source: the adapter or checkpoint, for messages.
        """

    @property
    def packs(self) -> bool:
        """Whether rows may be joined to one without padding."""
        return False

    @property
    def joins_rows(self) -> bool:
        """Whether an example holds several rows, told apart by its position ids."""
        return False

    @property
    def generate_rows(self) -> int:
        """Rows of validation and test that text is generated for; 0: none, -1: all."""
        return 0

    @abstractmethod
    def learn(self, splits: dict[str, Any]) -> None:
        """Settles columns and labels from the data: `splits` are datasets of raw rows by name.

        Raises:
            UserError: a column or label is unknown or missing.
        """

    def suppose(self) -> None:  # noqa: B027, most tasks build the same model for any data
        """Settles what the model depends on, as `learn` would, where there is no data yet."""

    @abstractmethod
    def learn_nothing(self) -> None:
        """Settles columns and labels by the settings alone: an adapter from elsewhere has no data.

        Raises:
            UserError: the settings do not say what cannot be guessed.
        """

    @abstractmethod
    def encode(
        self, rows: dict[str, list[Any]], tokenizer: Any, max_length: int, *, targets: bool = True
    ) -> dict[str, Any]:
        """Turns raw rows (column -> values) into lists of `input_ids`, `labels`, `truncated`...

        A row with nothing to learn from gets an empty `input_ids`; the data module drops and
        counts it. Where a row becomes several examples, `row` tells which. Without `targets`, for
        predictions, there are no `labels`.
        """

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """All that `encode` depends on, as plain values: the key of the tokenised cache."""

    @abstractmethod
    def strata(self, raw: Any) -> list[Any] | None:
        """A key for each row of which every made split gets its share, or None."""

    @abstractmethod
    def build_model(
        self, config: ModelConfig, tokenizer: Any, shards: Shards | None = None
    ) -> tuple[nn.Module, list[str]]:
        """The base model in train mode, and the names of the modules to train whole.

        Args:
            config: the base model.
            tokenizer: its tokenizer.
            shards: processes over which the base is spread.
        """

    def locate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds to a batch what would otherwise have to be counted on its device, and waited for.

        Called while the batch is still in the host's memory: `rows`, and `tokens` without padding.
        """
        if "tokens" in batch:
            return batch
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        tokens = ids.numel() if mask is None else int((mask == 1).sum())
        return {**batch, "rows": len(ids), "tokens": tokens}

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        """The loss over a batch: the one place that decides what is learned."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Fresh metrics, to be fed by `update_metrics`."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Names of the values that `metrics` compute."""

    @abstractmethod
    def update_metrics(
        self,
        metrics: MetricCollection,
        model: nn.Module,
        batch: dict[str, Any],
        output: LossOutput,
    ) -> None:
        """Adds a batch, and what `loss` gave for it, to the metrics."""

    def collect(self, batch: dict[str, Any]) -> list[Any]:
        """What `finish_epoch` is to be given of a batch's rows, on the host."""
        return []

    def finish_epoch(  # noqa: B027, most tasks measure batch by batch
        self, metrics: MetricCollection, model: nn.Module, rows: list[Any], batch_size: int
    ) -> None:
        """Adds to the metrics, at the end of an epoch, what is measured for many rows at once.

        Where processes gather a base's layers from each other, all have to call it.

        Args:
            metrics: to add to.
            model: in the state that the epoch has measured.
            rows: all that `collect` gave for the epoch's batches.
            batch_size: rows to compute at a time.
        """

    @abstractmethod
    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The model's logits for inputs without labels."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Readable predictions, one dict for each row of a batch."""

    @abstractmethod
    def show_prediction(self, prediction: dict[str, Any]) -> str:
        """A prediction on one line."""

    @abstractmethod
    def show_example(self, example: dict[str, Any], tokenizer: Any) -> str:
        """An encoded row as the model sees it, decoded, and what it is to learn."""

    @abstractmethod
    def find_inputs(self, columns: list[str]) -> None:
        """Settles which of a file's columns are the inputs of a prediction.

        Raises:
            UserError: they are not there.
        """

    @property
    def generative(self) -> bool:
        """Whether predictions are text that is written token by token."""
        return False

    def row_of(self, text: str) -> dict[str, Any]:
        """A text that stands alone as a row."""
        return {self.input_columns()[0]: text}

    @abstractmethod
    def input_columns(self) -> list[str]:
        """Columns that a prediction needs, the main one first."""

    @abstractmethod
    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        """A raw row as readable text: its `input` and its `target`."""

    def baseline(self, raws: list[dict[str, Any]]) -> tuple[str, dict[str, float]] | None:
        """What a rule without any learning reaches on raw rows: its name, and its text metrics."""
        return None

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `learn` settled, as plain values, to be stored with the adapter."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave: an adapter then needs no training data."""


def as_text(value: Any) -> str:
    """A value of a text, target or label column as text; "" where it is missing.

    Raises:
        TypeError: it is neither text, a number, true nor false.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()  # as files of JSON have it
    if isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(type(value).__name__)


def texts_of(rows: dict[str, list[Any]], column: str | None) -> list[str]:
    """The texts in a column of raw rows.

    Raises:
        UserError: a value is none.
    """
    assert column is not None
    check_texts("", column, rows[column])
    return [as_text(value) for value in rows[column]]


def check_texts(split: str, column: str | None, values: Sequence[Any]) -> None:
    """Raises UserError if a value is neither text, a number, nor missing."""
    for row, value in enumerate(values, 1):
        try:
            as_text(value)
        except TypeError as error:
            where = f"the {split} data holds no text in row {row} of" if split else "no text in"
            raise UserError(
                f"{where} column {column!r} but {error}: {str(value)[:60]}. Name another column "
                "or convert it."
            ) from None


def need_columns(split: str, rows: Any, columns: Sequence[str | None]) -> None:
    """Raises UserError if a split lacks a column that the training data has."""
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"the {split} data has no column {column!r}; its columns are "
                f"{', '.join(rows.column_names)}."
            )


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
