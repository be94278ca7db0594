"""Readers for the files of a training run, which skip damage by a kill or a power cut."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .terminal import say

_DIGITS = 18
"""Maximum number of digits of a step. A damaged number may be too long for Python to read."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if the file is absent or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a result.json, or {} if it is absent, damaged, or not from a run."""
    result = read_json(path)
    rungs = result.get("rungs", [])
    versions = result.get("versions", {})
    is_valid = (
        all(isinstance(result.get(key), (str, type(None))) for key in _TEXTS)
        and all(_is_number(result.get(key, 0)) for key in _NUMBERS)
        and all(_is_number(value, or_none=True) for key, value in result.items() if "/" in key)
        and _is_number(result.get("objective"), or_none=True)
        and isinstance(versions, dict)
        and isinstance(result.get("warnings", []), list)
        and all(isinstance(line, str) for line in result.get("warnings", []))
        and _are_numbers(result.get("rows", {}))
        and _are_numbers(result.get("baseline", {}), but="name")
        and isinstance(rungs, list)
        and all(isinstance(rung, dict) and _is_rung(rung) for rung in rungs)
    )
    return result if is_valid else {}


_TEXTS = ("status", "monitor", "error", "stopped", "config_hash", "device", "precision")
_TOO_LARGE = 10**18
_NUMBERS = ("steps", "seconds", "tokens_per_second", "trainable_parameters", "peak_memory_mib")


def _is_number(value: Any, *, or_none: bool = False) -> bool:
    """Return whether a value is a number that Python can convert to a float and to text."""
    if isinstance(value, int):
        return abs(value) < _TOO_LARGE
    return isinstance(value, float) or (or_none and value is None)


def _are_numbers(values: Any, *, but: str = "") -> bool:
    return isinstance(values, dict) and all(
        _is_number(value) for key, value in values.items() if key != but
    )


def _is_rung(rung: dict[str, Any]) -> bool:
    steps = [rung.get("step"), rung.get("planned")]
    return (
        all(isinstance(step, int) and 0 < step < _TOO_LARGE for step in steps)
        and isinstance(rung.get("monitor"), str)
        and all(_is_number(rung.get(key, 0)) for key in ("share", "loss"))
        and _is_number(rung.get("value"))
    )


def read_metrics(path: Path) -> tuple[list[dict[str, str]], int]:
    """Return the whole rows of a metrics.csv, and the number of damaged lines.

    The last line counts as damaged until its line feed is there, as half a number is a number.
    """
    lines, damaged = _lines(path)
    header, *lines = lines or [""]
    names = _cells(header)
    rows = []
    for line in filter(None, lines):
        values = _cells(line)
        row = dict(zip(names, values, strict=False))
        step = row.get("step", "")
        if len(values) == len(names) and step.isdecimal() and len(step) <= _DIGITS:
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def curve(rows: list[dict[str, str]], metric: str) -> list[tuple[int, float]]:
    """Return step and value of a metric for the rows of `read_metrics` that have it."""
    points = []
    for row in rows:
        with suppress(ValueError):  # the cell is empty in rows of other metrics
            points.append((int(row["step"]), float(row.get(metric, ""))))
    return points


def read_samples(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole rows of a samples.jsonl, and the number of damaged lines."""
    lines, damaged = _lines(path)
    rows = []
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
            if len(str(row["step"])) > _DIGITS:
                raise ValueError("no run makes so many steps")
            rows.append(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            damaged += 1
    return rows, damaged


def tell_damaged(path: Path, count: int) -> None:
    """Warn of damaged lines that are left out, if any."""
    if count:
        lines = "1 damaged line" if count == 1 else f"{count} damaged lines"
        say(f"warning: {path}: {lines} left out.", file=sys.stderr, flush=True)


def _lines(path: Path) -> tuple[list[str], int]:
    """Return the lines that end in a line feed, and the number of lines that do not.

    An absent file has no lines.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return [], 0
    *lines, rest = text.split("\n")  # str.splitlines would also split at U+2028 in a text
    return [line.removesuffix("\r") for line in lines], 1 if rest else 0


def _cells(line: str) -> list[str]:
    """Return the cells of a line of CSV, or none if the line is damaged."""
    try:
        return [] if "\0" in line else next(csv.reader([line]), [])
    except csv.Error:  # a cell longer than the module's limit
        return []
