"""Checks of settings in a file, which separate accepted settings from those only the user may set.

Adapter sidecars and checkpoints often come from others. Their settings must match an allow-list,
which is the groups and keys of `schema.py` and `tasks.py` with their types.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.lora.config import LoraConfig

from .schema import OWN_GROUPS, DataConfig, ModelConfig, OptimConfig
from .tasks import TASK_CONFIGS, current_task

ATTENTION = ("eager", "sdpa", "flex_attention")
"""Attention that torch itself has. For other names, transformers may fetch code from the hub."""
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Attention of an installed package, with its module. If it is absent, transformers fetches it."""
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Products of experts that torch itself has."""
ONLY_TYPED = (("model", "trust_remote_code"), ("data", "cache_dir"))
"""Group and key of settings that run code or write files. Values from a file are left out."""
_SCHEMAS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "lora": LoraConfig,
    "optim": OptimConfig,
}


def settings_from_file(settings: Mapping[str, Any], source: object) -> dict[str, dict[str, Any]]:
    """Return our own groups of settings as a file holds them, checked against their types.

    `trust_remote_code`, `cache_dir` and attention kernels that are not installed are left out.
    Groups that are not ours are left out too.

    Args:
        settings: groups by name.
        source: the file, for messages.

    Raises:
        UserError: a key or a type is wrong, or a value is not plain.
    """
    kept: dict[str, dict[str, Any]] = {}
    for group in OWN_GROUPS:
        if group not in settings:
            continue
        values = settings[group]
        if not isinstance(values, dict):
            raise UserError(f"{source}: its settings of {group!r} must be a mapping.")
        check_plain(values, f"{source}: {group}")
        current = current_task(values) if group == "task" else values
        kept[group] = _typed(group, current, source)
    for group, key in ONLY_TYPED:
        kept.get(group, {}).pop(key, None)
    if not is_installed_attention(kept.get("model", {}).get("attn_implementation")):
        kept.get("model", {}).pop("attn_implementation", None)
    return kept


def is_installed_attention(name: Any) -> bool:
    """Return whether attention that a file names is installed, so that no code is fetched."""
    package = FLASH.get(name) if isinstance(name, str) else None
    return name in ATTENTION or (package is not None and bool(importlib.util.find_spec(package)))


def check_plain(values: Any, where: str) -> None:
    """Raise UserError for values that read the environment (`${`) or build a class (`_target_`)."""
    try:
        text = json.dumps(values, default=str)
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{where}: settings must be plain values.") from None
    for mark in ("${", '"_target_"'):
        if mark in text:
            raise UserError(
                f"{where}: settings must be plain values, not {mark.strip(chr(34))}. Remove it "
                "from the file, or use a file of another source."
            )


def _typed(group: str, values: dict[str, Any], source: object) -> dict[str, Any]:
    """Return the values of a group, converted to the types of its dataclass."""
    own = dict(values)
    method = {"method": own.pop("method")} if group == "lora" and "method" in own else {}
    schema = _task_schema(own, source) if group == "task" else _SCHEMAS[group]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), own)
        plain = OmegaConf.to_container(merged)
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split("full_key")[0].split())
        key = f"{group}.{getattr(error, 'full_key', None) or '*'}".removesuffix(".*")
        raise UserError(f"{source}: {key} does not fit: {reason}.") from None
    assert isinstance(plain, dict)
    return {key: plain[key] for key in own} | method


def _task_schema(values: dict[str, Any], source: object) -> type[Any]:
    name = values.get("name")
    if not isinstance(name, str) or name not in TASK_CONFIGS:
        raise UserError(
            f"{source}: task.name={name!r}: unknown task."
            f"{did_you_mean(str(name), TASK_CONFIGS)} Known: {', '.join(TASK_CONFIGS)}."
        )
    return TASK_CONFIGS[name]


def check_task_state(state: Any, source: object) -> None:
    """Raise UserError unless the state that a task learned from its data holds plain values."""
    if not isinstance(state, dict):
        raise UserError(f"{source}: its task_state must be a mapping.")
    for key, value in state.items():
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, (str, int, float)) for part in parts):
            raise UserError(f"{source}: its task_state.{key} must be plain.")


def arguments_from_file(
    saved: Mapping[str, Any],
    source: object,
    *,
    typed: Mapping[str, Any] | None = None,
    added: Iterable[str] = (),
) -> dict[str, Any]:
    """Return a module's arguments from a checkpoint, overridden by typed arguments.

    Args:
        saved: hyper_parameters of the checkpoint.
        source: the checkpoint, for messages.
        typed: arguments of the caller (default: none). A dict changes the entries that it names.
        added: further arguments of the caller's own class, taken as plain values (default: none).

    Raises:
        UserError: the checkpoint's arguments are not what a run saves.
    """
    typed = typed or {}
    groups = {
        group: saved[group]
        for group in ("model", "task", "lora", "optim")
        if saved.get(group) is not None and isinstance(typed.get(group, {}), dict)
    }
    found: dict[str, Any] = {**settings_from_file(groups, source)}
    if "lora" in saved and saved["lora"] is None:
        found["lora"] = None
    if "task_state" in saved:
        check_task_state(saved["task_state"], source)
        found["task_state"] = saved["task_state"]
    if not isinstance(saved.get("seed", 0), int):
        raise UserError(f"{source}: its seed must be a whole number.")
    plain = {name: saved[name] for name in ("seed", *added) if name in saved}
    check_plain(plain, str(source))
    found |= plain
    for name, value in typed.items():
        if name == "task" and isinstance(value, dict):
            value = current_task(value)
            value["generation"] = found["task"].get("generation", {}) | value.get("generation", {})
        merges = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **value} if merges else value
    return found


def check_links(folder: Path) -> None:
    """Check that a folder holds no link to a file elsewhere, whose content would be copied.

    Weights are read only as tensors, so they may be links.

    Args:
        folder: folder of an adapter, a base model, or a tokenizer.

    Raises:
        UserError: the folder holds such a link.
    """
    for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        real = target_outside(path, folder)
        if real is not None and path.suffix != ".safetensors":
            raise UserError(
                f"{path} is a link to {real}, outside of its folder, which would be copied. Remove "
                f"it, or copy the files themselves: cp -rL {folder} NEW_FOLDER."
            )


def target_outside(path: Path, folder: Path) -> Path | None:
    """Return the target of a path in a folder if it is outside of the folder, else None.

    A folder in the hub's cache holds links to the files of its own repository. These files count
    as inside.

    Args:
        path: file in the folder, or a link.
        folder: folder that holds the path.
    """
    inside = folder.resolve()
    real = Path(os.path.realpath(path))  # tolerates a cycle of links
    own = [up / "blobs" for up in inside.parents if up.name.startswith(("models--", "datasets--"))]
    return None if any(real.is_relative_to(place) for place in (inside, *own)) else real


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON file. An invalid file gives an empty dict, and its actual reader reports it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_shard_files(folder: Path) -> None:
    """Check that the shard index and tokenizer of a base model name no file outside of its folder.

    Raises:
        UserError: such a file is named, or the index cannot be read.
    """
    named = _json(folder / "tokenizer_config.json").get("fast_tokenizer_files")
    for name in named if isinstance(named, list) else ():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"{folder}/tokenizer_config.json names a file outside of its folder: {name!r}."
            )
    for index in folder.rglob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = sorted(str(name) for name in files if Path(name).name != name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is damaged: {error!r}. Copy the model again.") from None
        if outside:
            raise UserError(
                f"{index} names {outside[0]!r}, but shards must be in the folder of their index. "
                "Copy the model again."
            )
