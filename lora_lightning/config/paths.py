"""Paths of a config that mean the same from every folder."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.output_folders import expanded

FILES = (
    *("model.name_or_path", "model.tokenizer", "adapter", "callbacks.retention.texts"),
    *("data.train", "data.val", "data.test", "data.path", "data.cache_dir"),
)
"""Settings that name files or folders. Hub names stay as they are."""
MADE = ("data.cache_dir",)
"""Settings of `FILES` whose paths a run creates."""


def anchor(config: DictConfig, base: Path) -> None:
    """Make the paths of a config absolute, in place, including paths with ~.

    A run may be resumed, and its adapter used, from other folders than it was started in.

    Args:
        config: composed config. Interpolations stay, because they may read values that must not be
            saved.
        base: folder that relative paths start from.
    """
    for key in FILES:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not isinstance(node, DictConfig) or name not in node:
            continue
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        value = node[name]
        if OmegaConf.is_list(value):
            raw = OmegaConf.to_container(value, resolve=False)
            assert isinstance(raw, list)
            node[name] = [_absolute(item, base, key) for item in raw]
        elif isinstance(value, str):
            node[name] = _absolute(value, base, key)


def check_data_files(config: DictConfig) -> None:
    """Check that the data files exist, before any library is loaded.

    Args:
        config: composed config with anchored paths.

    Raises:
        UserError: a file is missing.
    """
    for split in ("train", "val", "test"):
        if OmegaConf.is_interpolation(config.data, split):
            continue
        value = config.data[split]
        for item in value if OmegaConf.is_list(value) else [value]:
            if not isinstance(item, str) or "://" in item or glob.has_magic(item):
                continue
            path = expanded(item, f"data.{split}")
            if not path.exists():
                raise not_found(f"data.{split}", path)


def not_found(option: str, path: Path) -> UserError:
    """Return the error for a missing data file, with similar names that exist."""
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    where = "" if path.parent.is_dir() else f" The folder {path.parent} does not exist."
    return UserError(f"{option}={path}: not found.{where or did_you_mean(path.name, beside)}")


def _absolute(value: Any, base: Path, key: str) -> Any:
    """Return an absolute path if something exists there. Hub names and mistakes stay as typed."""
    if not isinstance(value, str) or not value or "://" in value or "${" in value:
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # ~ of a user unknown to the system
        return value
    if path.is_absolute():
        return str(path)
    try:
        there = key in MADE or os.path.lexists(base / path)
        there = there or (glob.has_magic(value) and any(base.glob(value)))
    except (OSError, ValueError):
        return value
    return os.path.abspath(base / path) if there else value
