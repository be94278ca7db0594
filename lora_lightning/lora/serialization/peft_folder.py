"""Adapters on disk: the PEFT folder, `adapter_config.json` and `adapter_model.safetensors`.

This module reads and writes only safetensors, never a pickle. Its folders load in PEFT and in
`transformers`. Folders from PEFT load here, or are refused with the reason.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.lora.config import LoraConfig
from lora_lightning.lora.embeddings import make_room
from lora_lightning.lora.model import Adapter
from lora_lightning.lora.name_patterns import ALL_LINEAR
from lora_lightning.utils.output_folders import replaced_folder

from .base_copies import without_copies
from .checksums import check_files
from .peft_config import to_peft_config

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# PEFT settings that change what an adapter computes and that are not implemented here. A file that
# uses one is refused, because ignoring it would silently change the outputs.
_UNSUPPORTED = (
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "megatron_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Settings of PEFT 0.21 and earlier that are read here or do not change a trained adapter.
_KNOWN = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "merge_weights"),
)
# These initializations also change the base weights, and a loader would have to repeat that.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_INITS = ("gaussian", "eva", "orthogonal", "mica")


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
            "this adapter was taken off its model (remove, merge_and_unload), so that there is "
            "nothing to save: save it before."
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
    for name, tensor in sorted(tensors.items(), key=lambda one: (-one[1].element_size(), one[0])):
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        kind = str(tensor.dtype).replace("torch.float", "F").replace("torch.int", "I")
        shape = list(tensor.shape)
        header[PREFIX + name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + stop


def _check_written(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that a file holds these tensors, before it replaces an older file."""
    found = load_file(path)
    if found.keys() != tensors.keys() or not all(
        torch.equal(found[name], tensor) for name, tensor in tensors.items()
    ):
        raise OSError("what was written reads otherwise, its disk or file system is at fault")


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a PEFT folder: its config as a dict, and its tensors by name without PEFT's prefix.

    Raises:
        UserError: a file is absent, unreadable, truncated or corrupt, or is no LoRA adapter.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"adapter folder {folder} does not exist. A run leaves its adapter in <run>/adapter."
        )
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        # PEFT writes an adapter with a name other than "default" into a folder of that name.
        name_it = f" Name the one inside: {folder / inside[0]}." if inside else ""
        if len(inside) > 1:
            name_it = f" Name one of those inside: {', '.join(str(folder / n) for n in inside)}."
        raise UserError(f"{folder} is not an adapter folder: it holds no {CONFIG_NAME}.{name_it}")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config_path} is not readable JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{config_path} describes no LoRA adapter (peft_type is {kind!r}).")
    if not weights_path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = (
            " It holds adapter_model.bin, a pickle, which can run code and is never read: convert "
            "it with the tool that made it."
            if pickled
            else ""
        )
        raise UserError(f"{folder} holds no {WEIGHTS_NAME}.{why}")
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
    return adapter_from(model, config, tensors, folder, together=is_together(raw))


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
        together: whether tied layers get one update (`is_together`). False by default.
    """
    _refuse_absent_rank(config, tensors, folder)
    whole = whole_modules(model, config.modules_to_save, tensors)
    config = replace(config, modules_to_save=whole)
    adapter = Adapter(model, config, strict=False)  # each tensor is checked instead
    source = f"adapter {folder}"
    try:
        if together:
            _refuse_tied_updates(adapter)
        adapter.load_tensors(without_copies(adapter, tensors, source), source=source)
        check_files(folder)  # last, since names, shapes and values tell more
    except UserError:
        adapter.remove()
        raise
    return adapter


def is_together(raw: dict[str, Any]) -> bool:
    """Return whether an adapter_config.json asks for one update of tied layers."""
    return _switch(raw, "ensure_weight_tying")


def _refuse_tied_updates(adapter: Adapter) -> None:
    """Raise UserError for a PEFT adapter that gives tied layers one common update."""
    weights = [weight for layer in adapter.layers.values() for weight in layer.parameters()]
    names = Counter(id(p) for _, p in adapter.model.named_parameters(remove_duplicate=False))
    if adapter._untied or any(names[id(weight)] > 1 for weight in weights):
        raise UserError(
            f"{CONFIG_NAME} sets ensure_weight_tying, and adapts embeddings that are tied to the "
            "output layer: one update for both is not supported, and two would give other outputs."
        )


def _refuse_absent_rank(config: LoraConfig, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Raise UserError for a rank that no tensor of the file can have.

    This check runs before such a rank takes memory.
    """
    widest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    rank = max([config.rank, *config.rank_pattern.values()])
    if rank > widest:
        raise UserError(
            f"{folder}: {CONFIG_NAME} says rank {rank}, and no tensor of {WEIGHTS_NAME} is as wide."
        )


def from_peft_config(raw: dict[str, Any]) -> LoraConfig:
    """Return the settings that an adapter_config.json describes.

    Raises:
        UserError: the file asks for something that is not implemented here. The message names it.
    """
    for key in _UNSUPPORTED:
        if raw.get(key):
            raise UserError(
                f"{CONFIG_NAME} sets {key}={raw[key]!r}, which is not supported: loading the "
                "adapter without it would give other outputs."
            )
    for key, value in raw.items():
        if value and key not in _KNOWN:
            raise UserError(
                f"{CONFIG_NAME} sets {key}={value!r}, which is not known: without it the adapter "
                "might give other outputs. If it changes nothing, take the line out."
            )
    _refuse_old_experts(raw)
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise UserError(
            f"{CONFIG_NAME} says init_lora_weights={init!r}: this adapter is relative to a changed "
            "base. Convert it to plain LoRA first (PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...))."
        )
    if isinstance(init, str) and init.lower() not in _OTHER_INITS:
        raise UserError(
            f"{CONFIG_NAME} says init_lora_weights={init!r}, which is not known: the adapter "
            "may be relative to a changed base. If it is not, set it to true."
        )
    if raw.get("target_modules") is None and not raw.get("target_parameters"):
        raise UserError(f"{CONFIG_NAME} names no target_modules.")
    try:
        return LoraConfig(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            targets=_targets(raw.get("target_modules")),
            target_parameters=_names(raw, "target_parameters"),
            exclude=raw.get("exclude_modules") or [],
            layers=_as_list(raw.get("layers_to_transform")),
            layers_pattern=raw.get("layers_pattern") or None,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            use_rslora=_switch(raw, "use_rslora"),
            use_dora=_switch(raw, "use_dora"),
            bias=raw.get("bias", "none"),
            modules_to_save=_names(raw, "modules_to_save"),
            trainable_token_indices=raw.get("trainable_token_indices") or None,
        )
    except (TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{CONFIG_NAME} holds a value of the wrong type: {error}.") from None


def _switch(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):  # the string "false" would count as true
        raise UserError(f"{CONFIG_NAME} says {key}={value!r}: it must be true or false.")
    return bool(value)


def _names(raw: dict[str, Any], key: str) -> list[str]:
    """Return a list of names. A single name becomes a list."""
    value = raw.get(key) or []
    return [value] if isinstance(value, str) else list(value)


def _targets(value: Any) -> Any:
    """Return the targets of a file.

    Any string except all-linear is a regex, even a plain name.
    """
    if not isinstance(value, str) or value.lower() == ALL_LINEAR:
        return value
    return f"(?:{value})"


def _refuse_old_experts(raw: dict[str, Any]) -> None:
    """Raise UserError for experts in PEFT's layout before 0.19.1, with in and out swapped.

    Square ones would load and give other outputs.
    """
    version = re.findall(r"\d+", str(raw.get("peft_version") or ""))[:3]
    if raw.get("target_parameters") and version and [int(part) for part in version] < [0, 19, 1]:
        raise UserError(
            f"{CONFIG_NAME} was written by PEFT {raw['peft_version']}, which laid the A and B of "
            "experts (target_parameters) out otherwise: merge the adapter with that PEFT."
        )


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


def _as_list(value: Any) -> list[int] | None:
    if value is None or value == []:
        return None
    return [value] if isinstance(value, int) else list(value)
