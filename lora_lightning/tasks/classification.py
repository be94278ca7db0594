"""Text classification: sentiment, topics, intents, and others with one of N labels for a text."""

from __future__ import annotations

import math
import re
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
from lora_lightning.models.loading import class_names, load_classifier

from .base import (
    IGNORE,
    LossOutput,
    Task,
    as_text,
    check_texts,
    need_columns,
    pick_column,
    texts_of,
)

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
            self._check_kinds(split, rows[self.label_column][:])
        if not self.labels:
            self._learn_labels(reference)
            self._settle_head()
        for split, rows in splits.items():
            self._check_names(split, getattr(rows.features[self.label_column], "names", None))
            self._check_labels(split, rows[self.label_column][:])

    def learn_nothing(self) -> None:
        if not self.config.labels:
            raise UserError("name the classes in the order of the head's rows: task.labels=[...].")
        self.labels = [str(label) for label in self.config.labels]
        self.text_column = self.config.text_column or TEXT_COLUMNS[0]
        self.pair_column = self.config.text_pair_column
        self.label_column = self.config.label_column or LABEL_COLUMNS[0]

    def suppose(self) -> None:
        self.labels = [str(label) for label in self.config.labels or ("0", "1")]

    def _learn_columns(self, columns: list[str]) -> None:
        self.find_inputs(columns)
        self.label_column = pick_column(
            self.config.label_column, LABEL_COLUMNS, columns, "task.label_column"
        )
        if self.label_column is None:
            raise _which_column("label", columns)

    def find_inputs(self, columns: list[str]) -> None:
        known = (self.text_column, *TEXT_COLUMNS) if self.text_column else TEXT_COLUMNS
        self.text_column = pick_column(self.config.text_column, known, columns, "task.text_column")
        if self.text_column is None:
            raise _which_column("text", columns)
        self.pair_column = pick_column(
            self.config.text_pair_column, (), columns, "task.text_pair_column"
        )

    def _learn_labels(self, rows: Any) -> None:
        assert self.label_column is not None
        feature = rows.features[self.label_column]
        values = [value for value in map(_written, rows[self.label_column][:]) if value != ""]
        distinct = sorted(set(values), key=_sort_key)
        if self.config.labels:
            self.labels = [str(label) for label in self.config.labels]
        elif hasattr(feature, "names"):
            self.labels = list(feature.names)
        else:
            self.labels = distinct
        if len(self.labels) != len(set(self.labels)):
            raise UserError(f"task.labels names a class twice: {', '.join(self.labels)}.")
        if not self.labels:
            raise UserError(
                f"column {self.label_column!r} is empty in all {len(rows)} rows: fill it in, or "
                "name the column with the label: task.label_column=NAME."
            )
        if len(self.labels) < 2:
            only = f"only {self.labels[0]!r}"
            raise UserError(
                f"column {self.label_column!r} holds {only}: a classifier needs two classes or "
                "more. Name the column with the label: task.label_column=NAME."
            )
        if len(self.labels) > 1000 or (len(values) > 50 and len(distinct) > len(values) // 2):
            raise UserError(
                f"column {self.label_column!r} holds {len(distinct)} different values in "
                f"{len(values)} rows, so it is no class label. Name the column with the label: "
                "task.label_column=NAME."
            )

    def _settle_head(self) -> None:
        """Give the classes the places that they have in an existing head.

        Raises:
            UserError: the head has other classes, or the user has typed another order.
        """
        head, typed = self._head, self.config.labels is not None
        if head is None or len(head) != len(self.labels):
            return
        ours = {label.casefold(): label for label in self.labels}
        theirs = [name.casefold() for name in head]
        source = f"adapter={self._begins_with}" if self._begins_with else "the base's head"
        if set(theirs) == set(ours) and len(ours) == len(self.labels):
            ordered = [ours[name] for name in theirs]
            if typed and ordered != self.labels:
                raise UserError(
                    f"task.labels={_listed(self.labels)} is another order than that of {source}: "
                    f"leave it out, or give task.labels={_listed(ordered)}."
                )
            self.labels = ordered
            return
        if self._begins_with:
            if not typed:
                raise UserError(
                    f"{source} has learned the classes {', '.join(head)}, and the data has "
                    f"{', '.join(self.labels)}. If they mean the same, name the data's in the "
                    "order of the former: task.labels=[...]."
                )
            return
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in head)
        if unnamed and (typed or self.labels == [str(i) for i in range(len(head))]):
            return
        self._new_head = True
        self.notes = [
            f"The base's head is of other classes ({', '.join(head)}) than the data "
            f"({', '.join(self.labels)}): training begins with a new head."
            + (" To keep it, name its rows in their order: task.labels=[...]." if unnamed else "")
        ]

    def _check_names(self, split: str, names: list[str] | None) -> None:
        """Map the numbers that a dataset gives its classes to the ids of their names."""
        same = names is not None and set(names) == set(self.labels)
        if names is None or (self.config.labels and not same):
            return
        places = {number: self.labels.index(name) for number, name in enumerate(names) if same}
        if not same or (numbered := self._numbered or places) != places:
            raise UserError(
                f"the {split} data numbers its classes as {', '.join(names)}, and the training "
                f"data as {', '.join(self.labels)}: the same number is another class. Write the "
                "names themselves into the label column, or leave out task.labels."
            )
        self._ids = self._numbered = numbered

    def _check_kinds(self, split: str, values: list[Any]) -> None:
        for row, value in enumerate(values, 1):
            if value is not None and not isinstance(value, (str, int, float)):
                name = type(value).__name__
                kind = {"list": "a list", "dict": "an object"}.get(name, f"a {name}")
                raise UserError(
                    f"the {split} data has {kind} as its label in row {row}, and a label is one "
                    f"name or number (column {self.label_column!r}). Name the column with the "
                    "label: task.label_column=NAME."
                )

    def _check_labels(self, split: str, values: list[Any]) -> None:
        lacking = [row for row, value in enumerate(values, 1) if _written(value) == ""]
        if lacking:
            raise UserError(
                f"the {split} data has no label in {len(lacking)} of {len(values)} rows, the first "
                f"is row {lacking[0]} below the header (column {self.label_column!r}): fill it in "
                "or remove the row."
            )
        for row, value in enumerate(values):
            if self.label_id(value) is None:
                shown = repr(_written(value) if isinstance(value, bool) else value)
                raise UserError(
                    f"the {split} data has the unknown label {shown} in row {row + 1}."
                    f"{did_you_mean(_written(value), self.labels)} Known labels: "
                    f"{', '.join(self.labels)}. Correct it, or list all: task.labels=[...]."
                )

    def label_id(self, value: Any) -> int | None:
        """Return the id of a label as written in a file, or None if there is no such label.

        A number that is not a name is a place in `task.labels`, unless these are numbers
        themselves.
        """
        if isinstance(value, int) and not isinstance(value, bool) and value in self._ids:
            return self._ids[value]
        name = _written(value)
        # A truth value has no spelling of its own, so both usual spellings are its name.
        for spelling in (name, str(value)) if isinstance(value, bool) else (name,):
            if spelling in self.labels:
                return self.labels.index(spelling)
        if self.config.labels and not any(map(_is_number, self.labels)):
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
        return None if column is None else [_written(value) for value in raw[column][:]]

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


def _which_column(what: str, columns: list[str]) -> UserError:
    return UserError(
        f"which column holds the {what}? The data has {', '.join(columns)}. "
        f"Name it: task.{what}_column=NAME."
    )


def _listed(labels: list[str]) -> str:
    return f"[{','.join(labels)}]"


def _written(value: Any) -> str:
    """Return a label as written in a file, without outer blanks. "" means no label."""
    return as_text(value).strip()


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _sort_key(name: str) -> tuple[bool, float, str]:
    """Return a sort key that orders numbers by their value, before all names."""
    return (False, float(name), name) if _is_number(name) else (True, 0.0, name)
