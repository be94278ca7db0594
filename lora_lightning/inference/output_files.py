"""Files that predict and evaluate write: never over what something else has written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_lightning.adapters.folder import refuse_run
from lora_lightning.lora import UserError

_SHOWN = 5
"""Names that a message tells at most."""
_LONGEST = 2**26
"""Bytes of a file that are looked at."""


def refuse_other_file(output: Path, *, by: str, sources: Iterable[Path] = ()) -> None:
    """Refuse a place for a file where another's would be lost.

    What the command itself has written there may be replaced.

    Args:
        output: the file.
        by: predict or evaluate.
        sources: what the command reads.

    Raises:
        UserError: it is what the command reads, lies among a run's own files, or was written by
            something else.
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
    """The JSON of a file, or of its first line; None where it is none."""
    with path.open("rb") as handle:
        content = handle.readline(_LONGEST) if lines else handle.read(_LONGEST)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _is_own(found: Any, by: str) -> bool:
    """Whether a JSON value is such as a command writes."""
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
