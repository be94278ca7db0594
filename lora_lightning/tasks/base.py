"""Base class of tasks, which define the examples, the loss and the metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.parallel_dims import ParallelDims

IGNORE = -100
"""Label of a position or row that loss and metrics ignore."""


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device. Its numbers stay as they are."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


@dataclass
class LossOutput:
    """Result of a task's loss for a batch."""

    total: Tensor
    """Loss summed over targets, a scalar with a graph."""
    count: Tensor
    """Number of targets, a scalar. `total / count` is the mean."""
    outputs: Tensor | None
    """Further input of `update_metrics`. It may be missing while the model is training."""


class Task(ABC):
    """Task that turns rows into examples and defines the loss and the metrics.

    One object serves a run. The data module makes it learn the labels from the data and encode
    rows. The LightningModule asks it for the model, the loss and the metrics.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    """Metric that the progress bar shows in addition to the loss."""
    peft_task_type: str
    dropped_means: ClassVar[str] = "empty text"
    """Reason why a row has nothing to learn."""
    dropped_advice: ClassVar[str] = "Name the column with the text: task.text_column=NAME."
    """Advice for the case that no row has anything to learn."""
    notes: Sequence[str] = ()
    """Messages to the user after `learn`."""
    stop_requested: Callable[[], bool] | None = None
    """Function that returns whether the run was asked to end. The result of `finish_epoch` is then
    not used."""
    config: Any
    """Settings of the task, a dataclass with at least `name`, `monitor` and `mode`."""

    def prepare(self, model_config: Any) -> None:  # noqa: B027, most tasks suit any model
        """Record the model's transformers config, before any row is encoded.

        Raises:
            UserError: this kind of model cannot learn the task.
        """

    def begin_with(self, state: dict[str, Any], source: str) -> None:  # noqa: B027
        """Record the task's `state` of the run whose values this run starts with.

        Args:
            state: state of a task of any kind.
            source: the adapter or checkpoint, for messages.
        """

    @property
    def packs(self) -> bool:
        """Whether rows may be packed into one row without padding."""
        return False

    @property
    def joins_rows(self) -> bool:
        """Whether an example holds several rows, separated by its position ids."""
        return False

    @property
    def generate_rows(self) -> int:
        """Validation and test rows to generate text for. 0 means none, and -1 means all."""
        return 0

    @abstractmethod
    def learn(self, splits: dict[str, Any]) -> None:
        """Determine columns and labels from the data.

        Args:
            splits: datasets of raw rows by name.

        Raises:
            UserError: a column or label is unknown or missing.
        """

    def assume_labels(self) -> None:  # noqa: B027, most tasks build the same model for any data
        """Set the values that the model depends on, as `learn` does, if there is no data yet."""

    @abstractmethod
    def learn_from_settings(self) -> None:
        """Determine columns and labels from the settings alone.

        This serves an adapter from elsewhere, which has no data.

        Raises:
            UserError: the settings lack a value that cannot be guessed.
        """

    @abstractmethod
    def encode(
        self, rows: dict[str, list[Any]], tokenizer: Any, max_length: int, *, targets: bool = True
    ) -> dict[str, Any]:
        """Turn raw rows (column -> values) into lists of `input_ids`, `labels`, `truncated`...

        A row with nothing to learn from gets an empty `input_ids`. The data module drops and counts
        it. If a row becomes several examples, `row` names the row of each example. Without
        `targets`, for predictions, there are no `labels`.
        """

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Return everything that `encode` depends on, as plain values.

        It is the key of the tokenized cache.
        """

    @abstractmethod
    def strata(self, raw: Any) -> list[Any] | None:
        """Return a key for each row, or None. Each split that is cut gets its share of each key."""

    @abstractmethod
    def build_model(
        self, config: ModelConfig, tokenizer: Any, shards: ParallelDims | None = None
    ) -> tuple[nn.Module, list[str]]:
        """Return the base model in train mode, and the names of the modules to train whole.

        Args:
            config: settings of the base model.
            tokenizer: tokenizer of the base model.
            shards: processes over which the base is sharded (default: none).
        """

    def locate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the counts to a batch that would otherwise require waiting for its device.

        The call occurs while the batch is still in host memory. It adds `rows`, and `tokens`
        without padding.
        """
        if "tokens" in batch:
            return batch
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        tokens = ids.numel() if mask is None else int((mask == 1).sum())
        return {**batch, "rows": len(ids), "tokens": tokens}

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        """Return the loss over a batch. Only this method decides what is learned."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """Return fresh metrics, to be updated by `update_metrics`."""

    @abstractmethod
    def metric_names(self) -> list[str]:
        """Return the names of the values that `metrics` compute."""

    @abstractmethod
    def update_metrics(
        self,
        metrics: MetricCollection,
        model: nn.Module,
        batch: dict[str, Any],
        output: LossOutput,
    ) -> None:
        """Add a batch, and the result of `loss` for it, to the metrics."""

    def collect(self, batch: dict[str, Any]) -> list[Any]:
        """Return the data of a batch's rows that `finish_epoch` needs, on the host."""
        return []

    def finish_epoch(  # noqa: B027, most tasks measure batch by batch
        self, metrics: MetricCollection, model: nn.Module, rows: list[Any], batch_size: int
    ) -> None:
        """Add values that are measured over many rows at once to the metrics, after an epoch.

        If processes gather a base's layers from each other, all processes must call it.

        Args:
            metrics: metrics to add to.
            model: model in the state that the epoch has measured.
            rows: everything that `collect` returned for the epoch's batches.
            batch_size: rows to compute at a time.
        """

    @abstractmethod
    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Return the model's logits for inputs without labels."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Return readable predictions, one dict for each row of a batch."""

    @abstractmethod
    def show_prediction(self, prediction: dict[str, Any]) -> str:
        """Return a prediction as one line."""

    @abstractmethod
    def show_example(self, example: dict[str, Any], tokenizer: Any) -> str:
        """Return an encoded row, decoded as the model sees it, with its targets."""

    @abstractmethod
    def find_inputs(self, columns: list[str]) -> None:
        """Determine which columns of a file are the inputs of a prediction.

        Raises:
            UserError: the columns are missing.
        """

    @property
    def generative(self) -> bool:
        """Whether predictions are text that is generated token by token."""
        return False

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a single text as a row."""
        return {self.input_columns()[0]: text}

    @abstractmethod
    def input_columns(self) -> list[str]:
        """Return the columns that a prediction needs, the main one first."""

    @abstractmethod
    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        """Return a raw row as readable text, with its `input` and its `target`."""

    def baseline(self, raws: list[dict[str, Any]]) -> tuple[str, dict[str, float]] | None:
        """Return the name of a rule without learning and its metrics on raw rows, or None."""
        return None

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what `learn` determined, as plain values, to be saved with the adapter."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Restore the values of `state`, so that an adapter needs no training data."""
