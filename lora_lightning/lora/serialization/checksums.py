"""Checksums of the files in an adapter folder, which the run stores beside them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.utils.folder_swap import MARK
from lora_lightning.utils.output_folders import digest

SIDECAR = "lora_lightning.json"
"""Name of our own file beside PEFT's, with task, labels, base model and settings."""
_OLD, _KEY = "weights_sha256", "sha256"
"""Keys of the checksums: formerly of the weights alone, now of all files by name."""
_CONTENT = "content_sha256"
"""Key of the checksum of our file's own content, without the checksums."""
_FREE = (SIDECAR, MARK, "README.md")
"""Files without a checksum."""


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by name, without the files in `_FREE`."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in _FREE)
    return {path.name: digest(path) for path in sorted(files)}


def write_checksums(folder: Path, content: dict[str, object]) -> None:
    """Write our own file, with the checksums of all files beside it."""
    values = json.loads(json.dumps({key: value for key, value in content.items() if key != _OLD}))
    sums = {_CONTENT: _digest_of(values), _KEY: checksums(folder)}
    text = json.dumps({**values, **sums}, indent=2, sort_keys=True)
    (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")


def _digest_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 of our file's content, independent of its formatting."""
    values = {key: value for key, value in content.items() if key not in (_OLD, _KEY, _CONTENT)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_content(content: dict[str, Any], path: Path) -> None:
    """Check that our own file has the content that its run wrote.

    An older file has no checksum.

    Raises:
        UserError: the content differs.
    """
    if _CONTENT in content and content[_CONTENT] != _digest_of(content):
        raise UserError(
            f"{path} is damaged, or was changed by hand: its checksum does not match. Copy it "
            f"again, or remove its line {_CONTENT} to keep the change."
        )


def check_files(folder: str | Path) -> None:
    """Check that an adapter's files are those that its run wrote.

    A folder from another tool has no checksums.

    Raises:
        UserError: a file is absent or its content differs.
    """
    folder = Path(folder)
    sidecar = folder / SIDECAR
    if not sidecar.is_file():
        return
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        recorded = dict((content.get(_KEY) or {}).items())
        if not all(Path(name).name == name for name in recorded):
            raise ValueError("a checksum names no file beside it")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{sidecar} is damaged: {error!r}. Copy the adapter again.") from None
    check_content(content, sidecar)
    if isinstance(content.get(_OLD), str):
        recorded.setdefault("adapter_model.safetensors", content[_OLD])
    for name, expected in sorted(recorded.items()):
        path = folder / name
        if not os.path.isfile(path):  # False also if the name is too long
            raise UserError(
                f"{path} not found, but {SIDECAR} has its checksum. Copy the adapter again."
            )
        if digest(path) != expected:
            raise UserError(
                f"{path} is damaged, or was changed by another tool: its checksum differs from "
                f"{SIDECAR}. Copy it again, or remove its line from {SIDECAR} to keep the change."
            )
