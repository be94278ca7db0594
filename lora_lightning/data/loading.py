"""Loading of rows from text that ships with the package, local files, or a hub dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_lightning.config.schema import DataConfig
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.cache_folder import cache_folder

from .docstrings import docstring_files
from .hub import load_hub
from .local_files import load_files
from .rows_cache import unwritable_cache

SPLITS = ("train", "val", "test")


EMBEDDED = Path(__file__).parent / "embedded"


BUILDERS = {"docstrings": docstring_files}
"""Builders of embedded data by name. Each writes its files to a folder on the user's machine."""


def load_splits(config: DataConfig) -> dict[str, Any]:
    """Return raw rows as `datasets.Dataset` for each split that exists.

    Raises:
        UserError: a file is missing, empty or malformed, or the hub dataset cannot be loaded.
    """
    files = {split: getattr(config, split) for split in SPLITS if getattr(config, split)}
    if files and config.path:
        raise UserError(
            f"data.path={config.path}: is not supported with data.{next(iter(files))}. Give either "
            "files or a hub dataset."
        )
    if files:
        cache = cache_folder(config.cache_dir)
        return {split: load_files(f"data.{split}", value, cache) for split, value in files.items()}
    if config.path:
        return load_hub(config, cache_folder(config.cache_dir))
    if config.embedded:
        return _load_embedded(config)
    raise UserError("data: must be given, as data.train=FILE or data.path=HUB_NAME.")


def _load_embedded(config: DataConfig) -> dict[str, Any]:
    name, cache = str(config.embedded), cache_folder(config.cache_dir)
    shipped = {path.name for path in EMBEDDED.iterdir() if path.is_dir()}
    if name in BUILDERS:
        try:
            paths = BUILDERS[name](cache)
        except OSError as error:
            raise unwritable_cache(cache, error) from None
    elif name in shipped:
        paths = {split: EMBEDDED / name / f"{split}.jsonl" for split in SPLITS}
    else:
        known = sorted(shipped | set(BUILDERS))
        raise UserError(
            f"data.embedded={name}: dataset not found.{did_you_mean(name, known)} "
            f"Known: {', '.join(known)}."
        )
    return {split: load_files(name, path, cache) for split, path in paths.items()}
