"""Rows of data files in a cache, by their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_lightning.errors import UserError, causes
from lora_lightning.utils.output_folders import digest, expanded

from .cache import is_whole, tell_damage, write_sums

SUMS = "sums.json"


READERS = 2
"""Counts changes of what our readers make of the same file."""


PLAIN = ("Value", "ClassLabel", "Json", "Translation", "TranslationVariableLanguages")
"""Kinds of columns of `datasets` whose values stand in the rows; others may name files and URLs."""


def cache_folder(cache_dir: str | None) -> Path:
    """Where data is kept that was made or tokenised here."""
    if cache_dir is not None:
        return expanded(cache_dir, "data.cache_dir")
    import datasets

    return Path(os.fspath(datasets.config.HF_DATASETS_CACHE)) / "lora_lightning"


def unwritable_cache(folder: Path, error: OSError) -> UserError:
    """The message where nothing can be kept."""
    return UserError(
        f"cannot write the cache of prepared data in {folder}: {error}. "
        "Choose another folder: data.cache_dir=DIR."
    )


def by_content(reader: Callable[..., Any], path: Path, cache: Path, **kwargs: Any) -> Any:
    """The rows of a file, kept in a cache by what it holds.

    The reader's own cache goes by path and time of change, which copies and archives keep.

    Args:
        reader: of `datasets`.
        path: the file.
        cache: the folder.
        kwargs: of the reader.

    Raises:
        UserError: nothing can be written there.
    """
    from datasets import __version__

    how = [reader.__name__, READERS, kwargs, __version__]
    content = json.dumps([digest(path), *how], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache / f"rows-{key}"
    try:
        if not is_kept(folder):
            shutil.rmtree(folder, ignore_errors=True)
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}-") as work:
                rows = reader(str(path), cache_dir=work, **kwargs)
                keep(rows, Path(work) / "kept", folder)
    except Exception as error:
        cause = causes(error)[-1]
        # pyarrow tells of a damaged file by an OSError too, without a number of the system's.
        if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT):
            raise unwritable_cache(cache, cause) from None
        raise
    return kept_rows(folder, key)


def is_kept(folder: Path) -> bool:
    """Whether rows are in a folder and whole; damage is told."""
    whole = is_whole(folder.glob("*.arrow"), folder / SUMS)
    if not whole and (folder / SUMS).exists():
        tell_damage(folder)
    return whole


def kept_rows(folder: Path, key: str) -> Any:
    """The rows that `keep` has put into a folder; `key` tells them apart from others."""
    from datasets import DatasetInfo, Features
    from datasets.table import MemoryMappedTable, concat_tables

    # A Dataset made from another describes all its columns again, and there may be thousands.
    table = concat_tables(
        [MemoryMappedTable.from_file(str(p)) for p in sorted(folder.glob("*.arrow"))]
    )
    info = DatasetInfo(features=Features.from_arrow_schema(table.schema))
    return stored(table, info, None, key)


def stored(table: Any, info: Any, split: Any, fingerprint: str) -> Any:
    """Rows whose values are those that the table holds.

    A table can declare a column as pictures or sound that lie elsewhere. Whoever reads the rows
    would open these files, or fetch them from the network.
    """
    from datasets import Dataset, Features

    declared = info.features
    table = table.replace_schema_metadata(None)
    stored = Features.from_arrow_schema(table.schema)
    info.features = Features(
        {name: kind if _is_plain(kind) else stored[name] for name, kind in declared.items()}
    )
    return Dataset(table, info=info, split=split, fingerprint=fingerprint)


def _is_plain(kind: Any) -> bool:
    """Whether a column's values stand in the rows themselves."""
    if isinstance(kind, dict):
        return all(map(_is_plain, kind.values()))
    inner = getattr(kind, "feature", None)  # of a list
    return type(kind).__name__ in PLAIN if inner is None else _is_plain(inner)


def keep(rows: Any, made: Path, folder: Path) -> None:
    """Moves the files of a dataset to a folder, with their checksums, in one step."""
    made.mkdir()
    files = [made / f"{i:05}.arrow" for i in range(len(rows.cache_files))]
    for file, entry in zip(files, rows.cache_files, strict=True):
        os.replace(entry["filename"], file)
    write_sums(files, made / SUMS)
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, with the same rows
            raise
