"""Writing of an adapter as a PEFT folder, which PEFT and `transformers` load.

The weights are a safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.lora.model import Adapter
from lora_lightning.utils.output_folders import replaced_folder

from .peft_config import CONFIG_NAME, to_peft_config

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of the names of tensors in PEFT's files."""


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    also: Callable[[Path], None] | None = None,
    by: str = "save_adapter",
    later: Iterable[str] = (),
) -> Path:
    """Write an adapter as a PEFT folder, with the same bytes for the same adapter.

    The folder appears whole or not at all, because it is written beside its place and renamed.

    Args:
        adapter: the adapter to write.
        folder: the destination. Earlier output of the same command is replaced.
        base_model: hub name or path of the base model, recorded for users who load the adapter.
            None by default.
        revision: the base model's hub revision. None by default.
        task_type: PEFT's task type, such as "SEQ_CLS" or "CAUSAL_LM". None by default.
        also: writes further files into the folder that it gets. None by default.
        by: the command that writes (`replaced_folder`). "save_adapter" by default.
        later: names of files that are written into the folder afterwards. Empty by default.

    Raises:
        UserError: the folder cannot be written, it holds files that others wrote, or the adapter
            was removed from its model.
    """
    if adapter.removed:
        raise UserError(
            "the adapter was removed from its model: call save_adapter before remove or "
            "merge_and_unload."
        )
    config = to_peft_config(adapter, base_model=base_model, revision=revision, task_type=task_type)
    with replaced_folder(Path(folder), by=by, later=later) as staging:
        write_files(staging, config, adapter.exported_tensors())
        if also is not None:
            also(staging)
    return Path(folder)


def write_files(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the two files of PEFT into a folder, and check that the weights are there."""
    stored = {
        PREFIX + name: tensor.detach().to("cpu").contiguous().clone()
        for name, tensor in sorted(tensors.items())
    }
    save_file(stored, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _check_written(folder / WEIGHTS_NAME, stored)


def weights_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the size in bytes of the weights file that `write_files` makes.

    The values do not matter. A safetensors file has eight bytes, a JSON header padded to a multiple
    of eight, and the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    # The library stores wider dtypes first.
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    ):
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        kind = str(tensor.dtype).replace("torch.float", "F").replace("torch.int", "I")
        shape = list(tensor.shape)
        header[PREFIX + name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + stop


def _check_written(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that a file holds these tensors, before it replaces an older file."""
    written = load_file(path)
    if written.keys() != tensors.keys() or not all(
        torch.equal(written[name], tensor) for name, tensor in tensors.items()
    ):
        raise OSError("the file differs when read back: the disk or the file system is faulty")
