"""Checkpoints on disk: safe reading, and comparison against the state to be saved."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.lora.serialization.validation import check_trained


class Damaged(UserError):
    """A checkpoint that cannot be read."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one of this package's checkpoints to the CPU, with plain values and tensors only.

    Raises:
        UserError: If the file is absent, truncated or damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: checkpoint not found.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not verify the checksums
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("its entries are compressed, which torch does not write")
            if (entry := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {entry} is wrong")
    except Exception as error:
        raise _damaged(path, error) from None
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from zip, pickle, or anything that a damaged pickle calls
        raise _damaged(path, error) from None
    weights = content.get("state_dict") if isinstance(content, dict) else None
    settings = content.get("hyper_parameters", {}) if isinstance(content, dict) else None
    if (
        not isinstance(weights, dict)
        or not all(isinstance(t, Tensor) and _is_held(t) for t in weights.values())
        or not isinstance(settings, dict)
    ):
        raise UserError(f"{path} is not a checkpoint of lora_lightning.")
    return content  # type: ignore[no-any-return]


def _is_held(tensor: Tensor) -> bool:
    """Return whether memory holds every value of a tensor, as a file may repeat one endlessly."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _damaged(path: Path, error: Exception) -> Damaged:
    reason = re.split(r"[.:;] ", " ".join(str(error).split()))[0][:200] or type(error).__name__
    others = sorted(str(other) for other in path.parent.glob("best-*.ckpt") if other != path)
    instead = (
        f", or start a new run from the best checkpoint: adapter={others[0]} with another "
        "output_dir"
        if others
        else ""
    )
    return Damaged(
        f"{path} is truncated or damaged, or holds more than values and tensors: {reason}. "
        "Copy it again from an intact source, or move it away to start the run again"
        f"{instead}."
    )


def check_trainable_values(live: Mapping[str, Tensor]) -> None:
    """Check that trained weights are worth a checkpoint.

    Raises:
        UserError: If the weights are not finite, or all zero.
    """
    check_trained(live, hint="The checkpoint before it is unchanged.")


def check_written(path: Path, live: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint holds the trained weights, before it replaces an older one.

    Raises:
        UserError: If the file cannot be read, or holds other weights.
    """
    stored = _read(path)["state_dict"]
    same = stored.keys() == live.keys() and all(
        torch.equal(stored[name], tensor.detach().cpu()) for name, tensor in live.items()
    )
    if not same:
        raise UserError(
            f"{path} does not hold what was written to it: its disk or file system is at fault. "
            "The checkpoint before it is unchanged."
        )
