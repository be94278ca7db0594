"""Folder for what is prepared or measured once on a machine."""

from __future__ import annotations

import os
from pathlib import Path

from .output_folders import expanded


def cache_folder(cache_dir: str | None = None) -> Path:
    """Return the folder for prepared data and measurements.

    Args:
        cache_dir: `data.cache_dir`. None (default) means a folder in the cache of `datasets`.

    Raises:
        UserError: `cache_dir` names a home folder that does not exist.
    """
    if cache_dir is not None:
        return expanded(cache_dir, "data.cache_dir")
    import datasets

    return Path(os.fspath(datasets.config.HF_DATASETS_CACHE)) / "lora_lightning"
