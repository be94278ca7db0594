"""Checkpoints on disk: read without running what they hold, compared with what was to be kept."""

from __future__ import annotations

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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip, pickle, or what a damaged pickle calls
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is truncated or damaged, or holds more than values and tensors: {reason}. "
            "Move it away to begin the run anew, or copy it again from where it is whole."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of lora_lightning.")
    return content


def check_written(path: Path, live: Mapping[str, Tensor]) -> None:
    """Makes sure that a checkpoint holds what is trained, before an older one makes way for it.

    Raises:
        UserError: the file cannot be read, or its tensors are not those in memory.
    """
    found = read_checkpoint(path)["state_dict"]
    same = found.keys() == live.keys() and all(
        torch.equal(found[name], tensor.detach().cpu()) for name, tensor in live.items()
    )
    if not same:
        raise UserError(
            f"{path} does not hold what was written to it: its disk or file system is at fault. "
            "The checkpoint before it was left as it is."
        )
