"""Class labels of a classification: what the data holds, and the order of the head's rows."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from lora_lightning.errors import UserError

from .columns import as_text


def check_label_types(split: str, column: str, values: list[Any]) -> None:
    """Raise UserError for a label that is neither a name, a number nor missing."""
    for row, value in enumerate(values, 1):
        if value is not None and not isinstance(value, (str, int, float)):
            name = type(value).__name__
            kind = {"list": "a list", "dict": "an object"}.get(name, f"a {name}")
            raise UserError(
                f"the {split} data, row {row}, column {column!r}: a label must be a name or a "
                f"number, and is {kind}. Name the column with the label: task.label_column=NAME."
            )


def find_labels(rows: Any, column: str, typed: list[str] | None) -> list[str]:
    """Return the class names in the order of their ids.

    Args:
        rows: training rows.
        column: column with the label.
        typed: `task.labels`. None takes the names that the dataset declares, or else the distinct
            values, sorted.

    Raises:
        UserError: the names are fewer than two, repeated, or too many to be classes.
    """
    feature = rows.features[column]
    values = [value for value in map(written, rows[column][:]) if value != ""]
    distinct = sorted(set(values), key=_sort_key)
    if typed:
        labels = [str(label) for label in typed]
    else:
        labels = list(feature.names) if hasattr(feature, "names") else distinct
    advice = "Name the column with the label: task.label_column=NAME."
    if len(labels) != len(set(labels)):
        raise UserError(f"task.labels: names a class twice: {', '.join(labels)}.")
    if not labels:
        raise UserError(
            f"column {column!r}: is empty in all {len(rows)} rows. Fill it in, or name the column "
            "with the label: task.label_column=NAME."
        )
    if len(labels) < 2:
        raise UserError(
            f"column {column!r}: must hold at least two classes, and holds only {labels[0]!r}. "
            f"{advice}"
        )
    if len(labels) > 1000 or (len(values) > 50 and len(distinct) > len(values) // 2):
        raise UserError(
            f"column {column!r}: holds {len(distinct)} different values in {len(values)} rows, too "
            f"many for a class label. {advice}"
        )
    return labels


class HeadOrder(NamedTuple):
    """Classes in the order of an existing head."""

    labels: list[str]
    """Class names in the order of their ids."""
    new_head: bool
    """Whether the base gets a new head instead of its own."""
    notes: list[str]
    """Messages to the user."""


def order_by_head(
    labels: list[str], head: list[str] | None, *, typed: list[str] | None, adapter: str
) -> HeadOrder:
    """Return the classes in the places that they have in an existing head.

    Args:
        labels: class names of the data.
        head: class names of the head. None means a base without a head.
        typed: `task.labels`. None means that the user typed no order.
        adapter: setting of the adapter that the head comes from, or "" for the base's own.

    Raises:
        UserError: the head has other classes, or the user typed another order.
    """
    if head is None or len(head) != len(labels):
        return HeadOrder(labels, False, [])
    by_name = {label.casefold(): label for label in labels}
    head_names = [name.casefold() for name in head]
    source = adapter or "the base's head"
    if set(head_names) == set(by_name) and len(by_name) == len(labels):
        ordered = [by_name[name] for name in head_names]
        if typed is not None and ordered != labels:
            raise UserError(
                f"task.labels={_listed(labels)}: must have the order of {source}. Remove it, or "
                f"type task.labels={_listed(ordered)}."
            )
        return HeadOrder(ordered, False, [])
    if adapter:
        if typed is None:
            raise UserError(
                f"{adapter}: has the classes {', '.join(head)}, and the data has "
                f"{', '.join(labels)}. If they mean the same, name the data's in the order of the "
                "former: task.labels=[...]."
            )
        return HeadOrder(labels, False, [])
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in head)
    if unnamed and (typed is not None or labels == [str(i) for i in range(len(head))]):
        return HeadOrder(labels, False, [])
    note = (
        f"The base's head has other classes ({', '.join(head)}) than the data "
        f"({', '.join(labels)}). Training begins with a new head."
    )
    if unnamed:
        note += " To keep the old one, name its rows in their order: task.labels=[...]."
    return HeadOrder(labels, True, [note])


def _listed(labels: list[str]) -> str:
    return f"[{','.join(labels)}]"


def written(value: Any) -> str:
    """Return a label as written in a file, without outer blanks. "" means no label."""
    return as_text(value).strip()


def is_number(name: str) -> bool:
    """Return whether a label is a finite number."""
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _sort_key(name: str) -> tuple[bool, float, str]:
    """Return a sort key that orders numbers by their value, before all names."""
    return (False, float(name), name) if is_number(name) else (True, 0.0, name)
