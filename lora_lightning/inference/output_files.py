"""Checks on the output files of predict and evaluate, which never overwrite other files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_lightning.lora import UserError
from lora_lightning.utils.run_folder import check_not_in_run

_MAX_NAMES = 5
"""Maximum number of names in a message."""
_MAX_BYTES = 2**26
"""Maximum number of bytes read from a file."""


def check_output_file(output: Path, *, by: str, sources: Iterable[Path] = ()) -> None:
    """Raise UserError if writing a file would overwrite the file of another program.

    A file that the command itself has written may be replaced.

    Args:
        output: File to write.
        by: Command that writes, predict or evaluate.
        sources: Files and folders that the command reads. Defaults to none.

    Raises:
        UserError: The file is an input of the command, is among a run's own files, or was written
            by another program.
    """
    check_not_in_run(output)
    for source in sources:
        if not source.exists():
            continue
        if output.exists() and os.path.samefile(output, source):
            raise UserError(f"output={output}: is what {by} reads. Choose another file.")
        if source.resolve() in output.resolve().parents:
            raise UserError(f"output={output}: is in what {by} reads. Choose another file.")
    if not output.is_file() or not output.stat().st_size:
        return
    value = _first_value(output, lines=by == "predict")
    if not _is_written_by(by, value):
        raise UserError(
            f"output={output}: exists, and {by} did not write it: it holds {_described(value)}. "
            "Choose another file, or move this one away."
        )


def _first_value(path: Path, *, lines: bool) -> Any:
    """Return the JSON of a file, or of its first line; None if it is not JSON."""
    with path.open("rb") as handle:
        content = handle.readline(_MAX_BYTES) if lines else handle.read(_MAX_BYTES)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _is_written_by(by: str, value: Any) -> bool:
    """Return whether a JSON value has the form that a command writes."""
    if not isinstance(value, dict):
        return False
    if by == "predict":
        return "prediction" in value
    return "rows" in value and any(str(name).startswith("test/") for name in value)


def _described(value: Any) -> str:
    if not isinstance(value, dict):
        return "something else"
    names = [str(name)[:40] for name in value]
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
