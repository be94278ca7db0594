"""Text classification: sentiment, topics, intents, and others with one of N labels for a text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from lora_lightning.config.schema import ClassificationConfig, ModelConfig
from lora_lightning.distributed.parallel_dims import ParallelDims
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.models.forward import classification_logits
from lora_lightning.models.loading import load_classifier
from lora_lightning.models.model_config import class_names

from .base import IGNORE, LossOutput, Task
from .columns import as_text, check_texts, need_columns, pick_column, texts_of, which_column
from .labels import check_label_types, find_labels, is_number, order_by_head, written

TEXT_COLUMNS = ("text", "sentence", "review", "content", "comment", "tweet", "document", "body")
LABEL_COLUMNS = (
    "label",
    "labels",
    "sentiment",
    "class",
    "category",
    "target",
    "stars",
    "rating",
    "topic",
)


class ClassificationTask(Task):
    """Task for any text classification, on encoders, decoders and encoder-decoders alike.

    Labels may be names or numbers, of any number of classes. The class names are stored in the
    model's config (`id2label`).
    """

    name = "classification"
    headline = "accuracy"
    peft_task_type = "SEQ_CLS"

    def __init__(self, config: ClassificationConfig | None = None) -> None:
        self.config = config or ClassificationConfig()
        self.text_column: str | None = None
        self.pair_column: str | None = None
        self.label_column: str | None = None
        self.labels: list[str] = []
        self._ids: dict[Any, int] = {}
        self._head: list[str] | None = None
        self._begins_with = ""
        self._new_head = False
        self._numbered: dict[Any, int] = {}
        """Class ids by the numbers that a dataset gives its classes."""

    def prepare(self, model_config: Any) -> None:
        self._head = class_names(model_config)

    def begin_with(self, state: dict[str, Any], source: str) -> None:
        labels = state.get("labels")
        if isinstance(labels, list):
            self._head, self._begins_with = [str(label) for label in labels], source

    # Rows to examples ------------------------------------------------------------------------

    def learn(self, splits: dict[str, Any]) -> None:
        reference = splits.get("train") or next(iter(splits.values()))
        self._learn_columns(reference.column_names)
        assert self.label_column is not None
        for split, rows in splits.items():
            need_columns(split, rows, [self.text_column, self.label_column])
            for column in filter(None, (self.text_column, self.pair_column)):
                need_columns(split, rows, [column])
                check_texts(split, column, rows[column][:])
            check_label_types(split, self.label_column, rows[self.label_column][:])
        if not self.labels:
            labels = find_labels(reference, self.label_column, self.config.labels)
            source = f"adapter={self._begins_with}" if self._begins_with else ""
            head = order_by_head(labels, self._head, typed=self.config.labels, adapter=source)
            self.labels, self._new_head, self.notes = head
        for split, rows in splits.items():
            self._check_names(split, getattr(rows.features[self.label_column], "names", None))
            self._check_labels(split, rows[self.label_column][:])

    def learn_from_settings(self) -> None:
        if not self.config.labels:
            raise UserError(
                "task.labels: must name the classes in the order of the head's rows, as in "
                "task.labels=[negative,positive]."
            )
        self.labels = [str(label) for label in self.config.labels]
        self.text_column = self.config.text_column or TEXT_COLUMNS[0]
        self.pair_column = self.config.text_pair_column
        self.label_column = self.config.label_column or LABEL_COLUMNS[0]

    def assume_labels(self) -> None:
        self.labels = [str(label) for label in self.config.labels or ("0", "1")]

    def _learn_columns(self, columns: list[str]) -> None:
        self.find_inputs(columns)
        self.label_column = pick_column(
            self.config.label_column, LABEL_COLUMNS, columns, "task.label_column"
        )
        if self.label_column is None:
            raise which_column("label", columns)

    def find_inputs(self, columns: list[str]) -> None:
        known = (self.text_column, *TEXT_COLUMNS) if self.text_column else TEXT_COLUMNS
        self.text_column = pick_column(self.config.text_column, known, columns, "task.text_column")
        if self.text_column is None:
            raise which_column("text", columns)
        self.pair_column = pick_column(
            self.config.text_pair_column, (), columns, "task.text_pair_column"
        )

    def _check_names(self, split: str, names: list[str] | None) -> None:
        """Map the numbers that a dataset gives its classes to the ids of their names."""
        same = names is not None and set(names) == set(self.labels)
        if names is None or (self.config.labels and not same):
            return
        places = {number: self.labels.index(name) for number, name in enumerate(names) if same}
        if not same or (numbered := self._numbered or places) != places:
            raise UserError(
                f"the {split} data: must number its classes as the training data, "
                f"{', '.join(self.labels)}, and numbers them {', '.join(names)}. Write names into "
                "the label column, or remove task.labels."
            )
        self._ids = self._numbered = numbered

    def _check_labels(self, split: str, values: list[Any]) -> None:
        lacking = [row for row, value in enumerate(values, 1) if written(value) == ""]
        if lacking:
            raise UserError(
                f"the {split} data, column {self.label_column!r}: {len(lacking)} of {len(values)} "
                f"rows have no label, first row {lacking[0]} below the header. Fill it in or "
                "remove the row."
            )
        for row, value in enumerate(values):
            if self.label_id(value) is None:
                shown = repr(written(value) if isinstance(value, bool) else value)
                raise UserError(
                    f"the {split} data: unknown label {shown} in row {row + 1}."
                    f"{did_you_mean(written(value), self.labels)} Known: "
                    f"{', '.join(self.labels)}. Correct it, or list all: task.labels=[...]."
                )

    def label_id(self, value: Any) -> int | None:
        """Return the id of a label as written in a file, or None if there is no such label.

        A number that is not a name is a place in `task.labels`, unless these are numbers
        themselves.
        """
        if isinstance(value, int) and not isinstance(value, bool) and value in self._ids:
            return self._ids[value]
        name = written(value)
        # A truth value has no spelling of its own, so both usual spellings are its name.
        for spelling in (name, str(value)) if isinstance(value, bool) else (name,):
            if spelling in self.labels:
                return self.labels.index(spelling)
        if self.config.labels and not any(map(is_number, self.labels)):
            places = [str(place) for place in range(len(self.labels))]
            return places.index(name) if name in places else None
        return None

    def encode(
        self, rows: dict[str, list[Any]], tokenizer: Any, max_length: int, *, targets: bool = True
    ) -> dict[str, Any]:
        assert self.text_column is not None
        texts = texts_of(rows, self.text_column)
        pairs = None
        if self.pair_column is not None:
            pairs = texts_of(rows, self.pair_column)
        full = tokenizer(texts, pairs, verbose=False)["input_ids"]
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        empty = [not text.strip() for text in texts]
        examples = {
            name: [[] if blank else row for blank, row in zip(empty, encoded[name], strict=True)]
            for name in ("input_ids", "token_type_ids")
            if name in encoded
        }
        examples["truncated"] = [len(ids) > max_length for ids in full]
        if targets and self.label_column is not None:
            examples["labels"] = [self.label_id(value) for value in rows[self.label_column]]
        return examples

    def signature(self) -> dict[str, Any]:
        return {"task": self.name, **self.state()}

    def strata(self, raw: Any) -> list[Any] | None:
        columns = raw.column_names
        column = pick_column(self.config.label_column, LABEL_COLUMNS, columns, "task.label_column")
        return None if column is None else [written(value) for value in raw[column][:]]

    # Model, loss, metrics --------------------------------------------------------------------

    def build_model(
        self, config: ModelConfig, tokenizer: Any, shards: ParallelDims | None = None
    ) -> tuple[nn.Module, list[str]]:
        return load_classifier(config, tokenizer, self.labels, shards, new_head=self._new_head)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        logits, labels = self.logits(model, batch), batch["labels"]
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return LossOutput(total, (labels != IGNORE).sum(), logits)

    def metrics(self) -> MetricCollection:
        classes = len(self.labels)
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1": MulticlassF1Score(classes, average="macro"),
        }
        if classes == 2:
            metrics["auroc"] = BinaryAUROC()
        # With compute groups, metrics with different inputs would share their states.
        return MetricCollection(metrics, compute_groups=False)

    def metric_names(self) -> list[str]:
        return ["accuracy", "f1", *(["auroc"] if len(self.labels) == 2 else [])]

    def update_metrics(
        self,
        metrics: MetricCollection,
        model: nn.Module,
        batch: dict[str, Any],
        output: LossOutput,
    ) -> None:
        assert output.outputs is not None
        kept = batch["labels"] != IGNORE
        logits, labels = output.outputs[kept], batch["labels"][kept]
        if not len(labels):
            return
        for name, metric in metrics.items(keep_base=True):
            binary = name == "auroc"
            metric.update(logits.softmax(-1)[:, 1] if binary else logits, labels)

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return classification_logits(model, batch).float()

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return self.predictions(self.logits(model, batch))

    def predictions(self, logits: Tensor) -> list[dict[str, Any]]:
        """Return the label and the scores for each row of logits."""
        rows = []
        for probabilities in logits.softmax(-1).tolist():
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            rows.append(
                {
                    "label": self.labels[best],
                    "score": round(probabilities[best], 6),
                    "scores": {
                        label: round(value, 6)
                        for label, value in zip(self.labels, probabilities, strict=True)
                    },
                }
            )
        return rows

    def show_prediction(self, prediction: dict[str, Any]) -> str:
        return f"{prediction['label']} ({prediction['score']:.3f})"

    def show_example(self, example: dict[str, Any], tokenizer: Any) -> str:
        return f"[{self.labels[example['labels']]}] {tokenizer.decode(example['input_ids'])}"

    def input_columns(self) -> list[str]:
        return [name for name in (self.text_column, self.pair_column) if name is not None]

    def describe(self, raw: dict[str, Any]) -> dict[str, str]:
        assert self.text_column is not None
        text = as_text(raw[self.text_column])
        if self.pair_column is not None:
            text += f" || {as_text(raw[self.pair_column])}"
        number = self.label_id(raw[self.label_column]) if self.label_column in raw else None
        return {"input": text, "target": "" if number is None else self.labels[number]}

    def baseline(self, raws: list[dict[str, Any]]) -> tuple[str, dict[str, float]] | None:
        """Return the metrics of the most frequent class as the answer to every row."""
        assert self.label_column is not None
        column = self.label_column
        counts = Counter(self.label_id(raw[column]) for raw in raws)
        ((_, most),) = counts.most_common(1)
        share = most / len(raws)
        f1 = 2 * share / (1 + share) / len(counts)  # as torchmetrics, over present classes
        return "majority class", {"accuracy": share, "f1": f1}

    # Kept with the adapter -------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "labels": self.labels,
            "raw_labels": [value for value, _ in sorted(self._ids.items(), key=lambda i: i[1])],
            "text_column": self.text_column,
            "text_pair_column": self.pair_column,
            "label_column": self.label_column,
        }

    def restore(self, state: dict[str, Any]) -> None:
        labels = state["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise TypeError(f"labels must be a list of names, not {labels!r}")
        self.labels = labels
        self._ids = {value: index for index, value in enumerate(state.get("raw_labels", []))}
        self.text_column = state["text_column"]
        self.pair_column = state.get("text_pair_column")
        self.label_column = state["label_column"]

    def class_counts(self, raw: Any) -> dict[str, int]:
        """Return the number of rows of each class in a raw dataset."""
        counts = Counter(self.label_id(value) for value in raw[self.label_column][:])
        return {label: counts.get(index, 0) for index, label in enumerate(self.labels)}


SentimentTask = ClassificationTask
"""Earlier name of `ClassificationTask`."""
