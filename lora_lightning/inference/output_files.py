"""Checks on the output files of predict and evaluate, which never overwrite other files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_lightning.adapters.folder import refuse_run
from lora_lightning.lora import UserError

_SHOWN = 5
"""Maximum number of names in a message."""
_LONGEST = 2**26
"""Maximum number of bytes read from a file."""


def refuse_other_file(output: Path, *, by: str, sources: Iterable[Path] = ()) -> None:
    """Raise UserError if writing a file would overwrite the file of another program.

    A file that the command itself has written may be replaced.

    Args:
        output: file to write.
        by: predict or evaluate.
        sources: files and folders that the command reads.

    Raises:
        UserError: the file is an input of the command, is among a run's own files, or was written
            by another program.
    """
    refuse_run(output)
    for source in sources:
        if not source.exists():
            continue
        if output.exists() and os.path.samefile(output, source):
            raise UserError(f"output={output} is what {by} reads: give another file.")
        if source.resolve() in output.resolve().parents:
            raise UserError(f"output={output} lies in what {by} reads: give another file.")
    if not output.is_file() or not output.stat().st_size:
        return
    found = _first_value(output, lines=by == "predict")
    if not _is_own(found, by):
        raise UserError(
            f"output={output} is there already, and {by} did not write it: it holds "
            f"{_described(found)}. Give another file, or move this one away."
        )


def _first_value(path: Path, *, lines: bool) -> Any:
    """Return the JSON of a file, or of its first line; None if it is not JSON."""
    with path.open("rb") as handle:
        content = handle.readline(_LONGEST) if lines else handle.read(_LONGEST)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _is_own(found: Any, by: str) -> bool:
    """Return whether a JSON value has the form that a command writes."""
    if not isinstance(found, dict):
        return False
    if by == "predict":
        return "prediction" in found
    return "rows" in found and any(str(name).startswith("test/") for name in found)


def _described(found: Any) -> str:
    if not isinstance(found, dict):
        return "something else"
    names = [str(name)[:40] for name in found]
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
