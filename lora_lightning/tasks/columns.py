"""Columns of rows: which one a task reads, and its values as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_lightning.errors import UserError, did_you_mean


def as_text(value: Any) -> str:
    """Return a value of a text, target or label column as text, or "" if it is missing.

    Raises:
        TypeError: the value is neither text, a number, true nor false.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON files
    if isinstance(value, (str, int, float)):
        return str(value)
    raise TypeError(type(value).__name__)


def texts_of(rows: dict[str, list[Any]], column: str | None) -> list[str]:
    """Return the texts in a column of raw rows.

    Raises:
        UserError: a value is not a text.
    """
    assert column is not None
    check_texts("", column, rows[column])
    return [as_text(value) for value in rows[column]]


def check_texts(split: str, column: str | None, values: Sequence[Any]) -> None:
    """Raise UserError if a value is neither text, a number, nor missing."""
    for row, value in enumerate(values, 1):
        try:
            as_text(value)
        except TypeError as error:
            where = f"the {split} data, row {row}, " if split else ""
            raise UserError(
                f"{where}column {column!r}: must hold text, and holds {error}: "
                f"{str(value)[:60]}. Name another column or convert it."
            ) from None


def need_columns(split: str, rows: Any, columns: Sequence[str | None]) -> None:
    """Raise UserError if a split lacks a column that the training data has."""
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"the {split} data: column {column!r} not found. Its columns are "
                f"{', '.join(rows.column_names)}."
            )


def pick_column(
    asked: str | None, candidates: Sequence[str], columns: Sequence[str], option: str
) -> str | None:
    """Return the column that the user named, or else the first candidate that exists, or None.

    Raises:
        UserError: the named column does not exist.
    """
    if asked is not None:
        if asked not in columns:
            raise UserError(
                f"{option}={asked}: column not found.{did_you_mean(asked, columns)} The data has "
                f"{', '.join(columns)}."
            )
        return asked
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in candidates if name in by_lower), None)


def which_column(what: str, columns: list[str]) -> UserError:
    """Return the error for a column that cannot be guessed."""
    return UserError(
        f"task.{what}_column: must be given, because no column of the data has a usual name for "
        f"the {what}. Type task.{what}_column=NAME with one of {', '.join(columns)}."
    )
