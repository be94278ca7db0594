"""Reading of JSON and JSON Lines with texts and numbers kept as written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_lightning.errors import UserError

from .readers import reason_of
from .rows_cache import by_content

LARGEST = 2**63
"""Integers from this value up, and below its negative, have no exact column type."""
_MAY_LOSE = re.compile(rb"-?(?:\d+\.\d|\d+[eE]|(?<=-)0)")
"""Pattern in a line of JSON with a number that Python may write differently."""
_LIKE_A_TIME = re.compile(rb'"(?=\d{4}-\d\d-\d\d[^"\\]*"\s*[,}\]])')


def read_json(option: str, path: Path, file: Path, cache: Path) -> Any:
    """Read a .json file with a list of objects, an object of columns, or one object per line."""
    from datasets import Dataset

    try:
        text = file.read_text(encoding="utf-8")
        content = _table(json.loads(text))
    except (ValueError, RecursionError):
        return _read_as_lines(option, path, file, cache)
    if _MAY_LOSE.search(text.encode()):
        _keep_numbers(content, _table(with_numbers(text)))
    try:
        if isinstance(content, list):
            return Dataset.from_list(content)
        return Dataset.from_dict(content)
    except Exception as error:
        raise UserError(
            f"{option}: {path} must hold a list of objects with the same keys: {reason_of(error)}"
        ) from error


def _table(content: Any) -> Any:
    """Return the list of objects that is an object's only value, or else the content itself."""
    if isinstance(content, dict) and len(content) == 1:
        (value,) = content.values()
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            return value
    return content


def _keep_numbers(content: Any, raw: Any) -> None:
    """Convert columns to text as written, in place, if Python writes their numbers differently."""
    if isinstance(content, dict):
        for name, values in raw.items():
            if isinstance(values, list) and any(map(is_odd, values)):
                content[name] = [as_written(value) for value in values]
        return
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        return
    odd = {name for row in raw for name, value in row.items() if is_odd(value)}
    for row, written in zip(content, raw, strict=True):
        row |= {name: as_written(written[name]) for name in odd if name in written}


def _read_as_lines(option: str, path: Path, file: Path, cache: Path) -> Any:
    try:
        return by_content(json_as_written, file, cache)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option}: {path} cannot be read as JSON: {reason_of(error)}") from error


def json_as_written(path: str, cache_dir: str) -> Any:
    """Return the rows of JSON lines with all strings as text.

    pyarrow turns strings that look like times into times. To avoid this, the types are inferred
    from a copy with a letter in front of such strings. The file is then read with these types. A
    column becomes text if it holds numbers that would not stay as written.

    Args:
        path: file to read.
        cache_dir: folder where `datasets` puts the rows.
    """
    from datasets import Dataset, Value

    times, found = False, set()
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            times = times or _LIKE_A_TIME.search(line) is not None
            if _MAY_LOSE.search(line):
                found.update(odd_numbers(_text(number, line)))
    odd = sorted(found)
    if not times and not odd:
        return Dataset.from_json(path, cache_dir=cache_dir)
    lettered = Path(cache_dir) / "lettered.jsonl"
    with open(path, "rb") as lines, lettered.open("wb") as copy:
        copy.writelines(_LIKE_A_TIME.sub(b'"x', line) for line in lines)
    features = Dataset.from_json(str(lettered), cache_dir=str(lettered.parent)).features
    features.update({name: Value("string") for name in odd})
    # `datasets` would take a list among the arguments for shards.
    how = {"path": path, "columns": tuple(features), "odd": tuple(odd)}
    return Dataset.from_generator(_objects, features=features, gen_kwargs=how, cache_dir=cache_dir)


def _objects(path: str, columns: tuple[str, ...], odd: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                row = written_numbers(_text(number, line), odd)
                yield {name: row.get(name) for name in columns}


def _text(number: int, line: bytes) -> str:
    return line.decode("utf-8-sig" if number == 0 else "utf-8")


class Number(str):
    """JSON number as written."""


def with_numbers(text: str) -> Any:
    """Parse JSON with each number as a `Number`."""
    return json.loads(text, parse_float=Number, parse_int=Number)


def is_odd(value: Any) -> bool:
    """Return whether a value of `with_numbers` is a number that Python writes differently."""
    return isinstance(value, Number) and str(json.loads(value)) != value


def odd_numbers(line: str) -> list[str]:
    """Return the columns of an object whose number Python writes differently (0.10, 1e5)."""
    return [name for name, value in with_numbers(line).items() if is_odd(value)]


def written_numbers(line: str, odd: Iterable[str]) -> dict[str, Any]:
    """Parse a JSON object, and keep the values of the `odd` columns as text, as written."""
    row: dict[str, Any] = json.loads(line)
    if odd:
        raw = with_numbers(line)
        row |= {name: as_written(raw[name]) for name in odd if name in raw}
    return row


def as_written(value: Any) -> str | None:
    """Return a value of `with_numbers` as text."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def check_object(option: str, path: Path, number: int, line: str) -> None:
    """Raise UserError for a line that is no JSON object, or whose integers have no exact type."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{option}: {path} must be JSON, and line {number} is not: {error}."
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{option}: {path} must hold one object per line, and line {number} is none. Write "
            'each line as {"column": value, ...}.'
        )
    for name, value in row.items():
        if isinstance(value, int) and not -LARGEST <= value < LARGEST:
            raise UserError(
                f"{option}: {path} holds a number that would lose digits in line {number}, column "
                f"{name!r}: {value}. Put it in double quotes."
            )
