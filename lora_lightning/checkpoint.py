"""Checkpoints on disk: read without running what they hold, compared with what was to be kept."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU. Nothing but plain values and tensors is read.

    Raises:
        UserError: it is absent, truncated or damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if (entry := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {entry} is wrong")
    except Exception as error:
        raise _damaged(path, error) from None
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip, pickle, or what a damaged pickle calls
        raise _damaged(path, error) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of lora_lightning.")
    return content


def _damaged(path: Path, error: Exception) -> UserError:
    reason = re.split(r"[.:;] ", " ".join(str(error).split()))[0][:200] or type(error).__name__
    others = sorted(str(other) for other in path.parent.glob("best-*.ckpt") if other != path)
    instead = (
        f", or start from what it had learned at its best: adapter={others[0]} with another "
        "output_dir"
        if others
        else ""
    )
    return UserError(
        f"{path} is truncated or damaged, or holds more than values and tensors: {reason}. "
        "Copy it again from where it is whole, or move it away to begin the run anew"
        f"{instead}."
    )


def check_written(path: Path, live: Mapping[str, Tensor]) -> None:
    """Makes sure that a checkpoint holds what is trained, before an older one makes way for it.

    Raises:
        UserError: the file cannot be read, or its tensors are not those in memory.
    """
    found = _read(path)["state_dict"]
    same = found.keys() == live.keys() and all(
        torch.equal(found[name], tensor.detach().cpu()) for name, tensor in live.items()
    )
    if not same:
        raise UserError(
            f"{path} does not hold what was written to it: its disk or file system is at fault. "
            "The checkpoint before it was left as it is."
        )
