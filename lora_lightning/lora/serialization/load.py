"""Reading of PEFT folders, and loading of their adapters onto a model.

Only safetensors files are read, never a pickle. A folder that cannot be loaded exactly raises an
error with the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.lora.config import LoraConfig
from lora_lightning.lora.embeddings import make_room
from lora_lightning.lora.model import Adapter

from .base_copies import without_copies
from .checksums import check_files
from .peft_config import CONFIG_NAME, from_peft_config, ties_updates
from .save import PREFIX, WEIGHTS_NAME


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a PEFT folder: its config as a dict, and its tensors by name without PEFT's prefix.

    Raises:
        UserError: a file is absent, unreadable, truncated or corrupt, or is no LoRA adapter.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"adapter folder {folder} does not exist. A run writes its adapter to <run>/adapter."
        )
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.is_file():
        # PEFT writes an adapter with a name other than "default" into a folder of that name.
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" Use the adapter in {' or '.join(inside)}." if inside else ""
        raise UserError(f"{folder} is not an adapter folder: {CONFIG_NAME} not found.{hint}")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config_path} is not readable JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{config_path}: must describe a LoRA adapter, not {kind!r}.")
    if not weights_path.is_file():
        hint = ""
        if (folder / "adapter_model.bin").exists():
            hint = (
                " adapter_model.bin is a pickle, which can run code and is never read: convert it "
                "with the tool that wrote it."
            )
        raise UserError(f"{weights_path} not found.{hint}")
    tensors = read_tensors(weights_path)
    return config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file, it is truncated or corrupt: {error}. "
            "Copy it again, or export the adapter again from its run's checkpoint."
        ) from None


def load_adapter(model: nn.Module, folder: str | Path) -> Adapter:
    """Load the adapter stored in `folder` onto `model`, strictly.

    If the adapter has rows of new tokens, the model's vocabulary grows until it holds them.

    Raises:
        UserError: see `read_adapter` and `Adapter.load_tensors`.
    """
    raw, tensors = read_adapter(folder)
    config = from_peft_config(raw)
    make_room(model, config, tensors, folder)
    return adapter_from(model, config, tensors, folder, together=ties_updates(raw))


def adapter_from(
    model: nn.Module,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    folder: str | Path,
    *,
    together: bool = False,
) -> Adapter:
    """Put an adapter on `model` from files in `folder` that have already been read.

    Args:
        model: the base, with room for the tokens that have their own rows (`make_room`).
        config: the settings from the files.
        tensors: the tensors from the files.
        folder: the folder, as messages name it.
        together: whether tied layers get one update (`ties_updates`). False by default.
    """
    _check_rank(config, tensors, folder)
    saved = whole_modules(model, config.modules_to_save, tensors)
    config = replace(config, modules_to_save=saved)
    adapter = Adapter(model, config, strict=False)  # each tensor is checked instead
    source = f"adapter {folder}"
    try:
        if together:
            _check_tied_updates(adapter)
        adapter.load_tensors(without_copies(adapter, tensors, source), source=source)
        check_files(folder)  # last, since other messages name the cause
    except UserError:
        adapter.remove()
        raise
    return adapter


def whole_modules(model: nn.Module, patterns: list[str], tensors: dict[str, Tensor]) -> list[str]:
    """Return the modules of `model` that a file stores whole, as PEFT reads modules_to_save.

    PEFT lists "classifier" and "score" for every sequence classifier, whether it has them or not.
    It also takes "pre_classifier" for a "classifier".
    """
    names = [name for name, _ in model.named_modules() if name]
    return [
        name
        for name in names
        for pattern in patterns
        if f".{name}".endswith(f".{pattern}")
        or (name.endswith(pattern) and any(key.startswith(f"{name}.") for key in tensors))
    ]


def _check_tied_updates(adapter: Adapter) -> None:
    """Raise UserError for a PEFT adapter that gives tied layers one common update."""
    weights = [weight for layer in adapter.layers.values() for weight in layer.parameters()]
    names = Counter(id(p) for _, p in adapter.model.named_parameters(remove_duplicate=False))
    if adapter.base_tensors.untied or any(names[id(weight)] > 1 for weight in weights):
        raise UserError(
            f"{CONFIG_NAME}: ensure_weight_tying=True is not supported with adapted embeddings "
            "that are tied to the output layer, since two updates would give other outputs."
        )


def _check_rank(config: LoraConfig, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Raise UserError for a rank that no tensor of the file can have.

    This check runs before such a rank takes memory.
    """
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    rank = max([config.rank, *config.rank_pattern.values()])
    if rank > widest:
        raise UserError(
            f"{folder}: {CONFIG_NAME} has rank {rank}, more than any tensor of {WEIGHTS_NAME}."
        )
