"""Cache of prepared data with checksums. Damaged data is rebuilt."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.output_folders import digest, sync
from lora_lightning.utils.terminal import say


def is_whole(files: Iterable[Path], sums: Path) -> bool:
    """Return whether files are unchanged since `write_sums` recorded them.

    Args:
        files: all files that belong together.
        sums: file with their checksums.
    """
    try:
        recorded = json.loads(sums.read_text(encoding="utf-8"))
        return bool(recorded == {_name(path, sums): digest(path) for path in files})
    except (OSError, ValueError, RecursionError):
        return False


def write_sums(files: Iterable[Path], sums: Path) -> None:
    """Write the checksums of new files, and sync everything to disk.

    Raises:
        OSError: the folder cannot be written.
    """
    digests = {}
    for path in files:
        sync(path)
        digests[_name(path, sums)] = digest(path)
    atomic_write(sums, json.dumps(digests, indent=2) + "\n")


def _name(path: Path, sums: Path) -> str:
    return Path(os.path.relpath(path, sums.parent)).as_posix()


def report_damage(path: Path) -> None:
    """Report that damaged prepared data is rebuilt."""
    say(f"{path} is damaged and is built again.", file=sys.stderr)
