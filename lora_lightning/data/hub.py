"""Hub datasets, and folders that `datasets` itself reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from lora_lightning.config.schema import DataConfig
from lora_lightning.config.untrusted import lies_elsewhere
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.output_folders import digest, expanded

from .cache import is_whole, report_damage, write_sums
from .folders import SPLITS_OF_SAVED, STATE, load_saved
from .local_files import load_files
from .readers import (
    BUILDERS,
    is_known,
    kind_of,
    reason_of,
)
from .rows_cache import is_kept, keep, kept_rows, stored, unwritable_cache

REMOTE = ("hf://", "https://", "http://")
"""URL prefixes of the files of a hub dataset."""


DESCRIPTIONS = ("README.md", "dataset_infos.json", ".huggingface.yaml")
"""Files next to a dataset that assign its files to splits and give their types."""


def load_hub(config: DataConfig, cache: Path) -> dict[str, Any]:
    """Return the rows of `data.path`, a hub dataset or the folder of one, by split."""
    path = expanded(str(config.path), "data.path")
    try:
        if (path / SPLITS_OF_SAVED).is_file():
            splits = _splits_of_saved(config, path)
        elif (path / STATE).is_file():
            splits = {"train": load_saved(f"data.path={path}", path)}
        elif path.is_dir():
            splits = _splits_of_folder(path, config, cache)
        else:
            splits = _hub(config, cache)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.path={config.path}: the hub dataset cannot be loaded: {reason_of(error)} "
            "Check the name, data.name and the network, or use data.train=FILE for local files."
        ) from error
    if config.splits:
        for split in config.splits.values():
            if split not in splits:
                raise UserError(
                    f"data.splits: split {split!r} not found in {config.path}."
                    f"{did_you_mean(split, splits)} Known: {', '.join(splits)}."
                )
        return {name: splits[hub_name] for name, hub_name in config.splits.items()}
    renamed = {"train": "train", "validation": "val", "val": "val", "dev": "val", "test": "test"}
    return {renamed[split]: rows for split, rows in splits.items() if split in renamed}


def _splits_of_saved(config: DataConfig, path: Path) -> dict[str, Any]:
    names = json.loads((path / SPLITS_OF_SAVED).read_text(encoding="utf-8"))["splits"]
    if not isinstance(names, list) or any(Path(str(name)).name != name for name in names):
        raise UserError(f"data.path={config.path}: its {SPLITS_OF_SAVED} is damaged.")
    return {name: load_saved(f"data.path={config.path}", path / name) for name in names}


def _hub(config: DataConfig, cache: Path) -> dict[str, Any]:
    """Return the splits of a hub dataset.

    Tables without types are read as local files are, with each cell as text. The downloaded files
    of such a table are recorded, for later runs without a network.
    """
    from datasets import DownloadConfig, DownloadManager, load_dataset_builder

    which = json.dumps([str(config.path), config.name, config.revision])
    record = cache / f"files-{hashlib.sha256(which.encode()).hexdigest()[:32]}.json"
    try:
        builder = load_dataset_builder(str(config.path), config.name, revision=config.revision)
    except Exception:
        if not record.is_file():
            raise
        return _load_recorded(config, record, cache)
    if builder.name == "cache" and record.is_file():  # rows of `datasets`, if there is no network
        return _load_recorded(config, record, cache)
    # The last part of a chain (zip://a.csv::hf://...) locates the file.
    _check_files(config, builder, lambda file: file.split("::")[-1].startswith(REMOTE))
    if builder.name != "csv" or not _is_plain_set(builder):
        return _prepared_rows(config, builder, cache)
    urls = {str(split): list(map(str, files)) for split, files in builder.config.data_files.items()}
    settings = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    copies = DownloadManager(builder.dataset_name, download_config=settings).download(urls)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        files = {
            split: [_with_ending(*pair, cache) for pair in zip(copies[split], names, strict=True)]
            for split, names in urls.items()
        }
        atomic_write(record, json.dumps(files, indent=2) + "\n")
    except OSError as error:
        raise unwritable_cache(cache, error) from None
    return _load_recorded(config, record, cache)


def _with_ending(file: str, url: str, cache: Path) -> str:
    """Return the path of a downloaded file, through a link if it lacks the ending of its URL."""
    if is_known(Path(file)):
        return file
    link = cache / f"{Path(file).name}-{PurePosixPath(url).name}"
    with suppress(FileExistsError):
        link.symlink_to(file)
    return str(link)


def _load_recorded(config: DataConfig, record: Path, cache: Path) -> dict[str, Any]:
    """Return the rows of the files that a record names by split."""
    files = json.loads(record.read_text(encoding="utf-8"))
    option = f"data.path={config.path}"
    return {split: load_files(option, names, cache) for split, names in files.items()}


def _prepared_rows(config: DataConfig, builder: Any, cache: Path) -> dict[str, Any]:
    """Return the splits that `datasets` prepares. Its cache is checked, and rebuilt if damaged."""
    from datasets import load_dataset_builder

    builder.download_and_prepare()
    splits = builder.as_dataset()
    files = sorted(
        {Path(part["filename"]) for rows in splits.values() for part in rows.cache_files}
    )
    key = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()[:32]
    sums = cache / f"hub-{key}.json"
    if sums.exists() and not is_whole(files, sums):
        report_damage(files[0].parent)
        before = [digest(file) for file in files]
        builder = load_dataset_builder(str(config.path), config.name, revision=config.revision)
        builder.download_and_prepare(download_mode="reuse_cache_if_exists")
        splits = builder.as_dataset()
        if [digest(file) for file in files] == before:
            raise UserError(
                f"data.path={config.path}: its rows in {files[0].parent} are damaged and cannot "
                "be prepared again without a network. Delete that folder and run with a network."
            )
        sums.unlink()
    if files and not sums.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_sums(files, sums)
        except OSError as error:
            raise unwritable_cache(cache, error) from None
    return {
        split: stored(rows.data, rows.info.copy(), rows.split, rows._fingerprint)
        for split, rows in splits.items()
    }


def _splits_of_folder(path: Path, config: DataConfig, cache: Path) -> dict[str, Any]:
    """Return the splits of a folder that is laid out like a hub dataset, cached by content."""
    from datasets import __version__, load_dataset_builder

    inside = path.resolve()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_cache(cache, error) from None
    with tempfile.TemporaryDirectory(dir=cache, prefix=".set-") as work:
        builder = load_dataset_builder(str(inside), config.name, cache_dir=work)
        files = _check_files(
            config, builder, lambda file: lies_elsewhere(Path(file), inside) is None
        )
        if _is_plain_set(builder):
            return {
                str(split): load_files(f"data.path={path}", sorted(map(str, names)), cache)
                for split, names in builder.config.data_files.items()
            }
        files += [str(inside / name) for name in DESCRIPTIONS if (inside / name).is_file()]
        sums = {os.path.relpath(file, inside): digest(Path(file)) for file in files}
        content = json.dumps([sums, builder.name, config.name, __version__], sort_keys=True)
        keys = {
            str(split): hashlib.sha256(f"{split} {content}".encode()).hexdigest()[:32]
            for split in builder.config.data_files
        }
        kept = {split: cache / f"rows-{key}" for split, key in keys.items()}
        absent = [split for split, folder in kept.items() if not is_kept(folder)]
        if absent:
            builder.download_and_prepare()
            for number, split in enumerate(absent):
                shutil.rmtree(kept[split], ignore_errors=True)
                keep(builder.as_dataset(split), Path(work) / f"kept-{number}", kept[split])
    return {split: kept_rows(folder, keys[split]) for split, folder in kept.items()}


def _is_plain_set(builder: Any) -> bool:
    """Return whether a folder's files are text tables without a description.

    Our readers read such files, because the readers of `datasets` guess the types of the cells.
    """
    config = builder.config
    if builder.name not in ("csv", "json") or builder.info.features is not None:
        return False
    files = [Path(str(file)) for split in (config.data_files or {}).values() for file in split]
    implied = {"sep": BUILDERS[kind_of(files[0])[0]][1].get("sep", ",")} if files else {}
    usual = {**vars(type(config)()), **implied}
    named = ("name", "version", "data_dir", "data_files", "description")
    asked = {key: value for key, value in vars(config).items() if key not in named}
    return all(map(is_known, files)) and all(usual.get(key) == asked[key] for key in asked)


def _check_files(config: DataConfig, builder: Any, belongs: Callable[[str], bool]) -> list[str]:
    """Return the files of a dataset, after a check that they belong to it.

    The description of a dataset may name any file on the user's machine.

    Raises:
        UserError: a file does not belong to the dataset.
    """
    splits = (builder.config.data_files or {}).values()
    files = [str(file) for split in splits for file in split]
    for file in files:
        if not belongs(file):
            raise UserError(
                f"data.path={config.path}: names {file}, which is not part of it. To read that "
                "file use data.train=FILE."
            )
    return files
