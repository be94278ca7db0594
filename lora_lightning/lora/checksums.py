"""Checksums of the files in an adapter folder, which its run has written down beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .errors import UserError
from .outputs import MARK, digest

SIDECAR = "lora_lightning.json"
"""Our own file beside PEFT's: task, labels, base model and settings."""
_OLD, _KEY = "weights_sha256", "sha256"
"""Where it has the checksums: of the weights alone once, now of all files by name."""
_FREE = (SIDECAR, MARK, "README.md")
"""Files that have none."""


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that lie in a folder, but for those that have none."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in _FREE)
    return {path.name: digest(path) for path in sorted(files)}


def write_checksums(folder: Path, content: dict[str, object]) -> None:
    """Writes our own file, with the checksums of all that lies beside it."""
    kept = {key: value for key, value in content.items() if key != _OLD}
    text = json.dumps({**kept, _KEY: checksums(folder)}, indent=2, sort_keys=True)
    (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")


def check_files(folder: str | Path) -> None:
    """Makes sure that an adapter's files are those that its run has written.

    A folder of another tool has no checksums.

    Raises:
        UserError: one of them is absent or reads otherwise.
    """
    folder = Path(folder)
    sidecar = folder / SIDECAR
    if not sidecar.is_file():
        return
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        recorded = dict((content.get(_KEY) or {}).items())
        if not all(Path(name).name == name for name in recorded):
            raise ValueError("a checksum is of no file beside it")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{sidecar} is damaged: {error!r}. Copy the adapter again.") from None
    if isinstance(content.get(_OLD), str):
        recorded.setdefault("adapter_model.safetensors", content[_OLD])
    for name, expected in sorted(recorded.items()):
        path = folder / name
        if not os.path.isfile(path):  # also where the name is too long
            raise UserError(
                f"{path} is absent, and {SIDECAR} has its checksum. Copy the adapter again from "
                "where it is whole."
            )
        if digest(path) != expected:
            raise UserError(
                f"{path} is damaged, or was changed by another tool: its checksum is not the one "
                f"in {SIDECAR}. Copy it again from where it is whole. If the change was meant, "
                f"take its line out of {SIDECAR}."
            )
