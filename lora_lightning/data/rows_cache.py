"""Cache for the rows of data files, keyed by content."""

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
from lora_lightning.utils.output_folders import digest

from .cache import is_whole, report_damage, write_sums

SUMS = "sums.json"


READERS = 2
"""Version of our readers. It increases when they return different rows for the same file."""


PLAIN = ("Value", "ClassLabel", "Json", "Translation", "TranslationVariableLanguages")
"""Column types of `datasets` with values stored in the rows. Others may name files and URLs."""


def unwritable_cache(folder: Path, error: OSError) -> UserError:
    """Return the error for a cache that cannot be written."""
    return UserError(
        f"data.cache_dir: cannot write the cache in {folder}: {error}. Choose another folder: "
        "data.cache_dir=DIR."
    )


def by_content(
    reader: Callable[..., Any],
    path: Path,
    cache: Path,
    *,
    check: Callable[[], None] | None = None,
    **kwargs: Any,
) -> Any:
    """Return the rows of a file, cached by the file's content.

    The reader's own cache depends on path and modification time, which copies and archives keep.

    Args:
        reader: function that reads a file into a dataset of `datasets`.
        path: file to read.
        cache: cache folder.
        check: function that raises UserError for a file that must not be read. It is called before
            the reader, and not for cached rows (default: none).
        kwargs: further arguments of the reader.

    Raises:
        UserError: the cache cannot be written.
    """
    from datasets import __version__

    how = [reader.__name__, READERS, kwargs, __version__]
    content = json.dumps([digest(path), *how], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache / f"rows-{key}"
    try:
        if not is_kept(folder):
            if check is not None:
                check()
            shutil.rmtree(folder, ignore_errors=True)
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}-") as work:
                rows = reader(str(path), cache_dir=work, **kwargs)
                keep(rows, Path(work) / "kept", folder)
    except Exception as error:
        cause = causes(error)[-1]
        # pyarrow also raises an OSError for a damaged file, but without a system error number.
        if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT):
            raise unwritable_cache(cache, cause) from None
        raise
    return kept_rows(folder, key)


def is_kept(folder: Path) -> bool:
    """Return whether a folder holds intact rows, and report damage."""
    whole = is_whole(folder.glob("*.arrow"), folder / SUMS)
    if not whole and (folder / SUMS).exists():
        report_damage(folder)
    return whole


def kept_rows(folder: Path, key: str) -> Any:
    """Return the rows that `keep` stored in a folder, with `key` as their fingerprint."""
    from datasets import DatasetInfo, Features
    from datasets.table import MemoryMappedTable, concat_tables

    # A Dataset made from another one describes all columns again. There may be thousands.
    table = concat_tables(
        [MemoryMappedTable.from_file(str(p)) for p in sorted(folder.glob("*.arrow"))]
    )
    info = DatasetInfo(features=Features.from_arrow_schema(table.schema))
    return stored(table, info, None, key)


def stored(table: Any, info: Any, split: Any, fingerprint: str) -> Any:
    """Return a dataset whose values are the values stored in the table.

    A table can declare a column as images or audio in other files. Reading its rows would open
    these files or fetch them from the network.
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
    """Return whether the values of a column are stored in the rows themselves."""
    if isinstance(kind, dict):
        return all(map(_is_plain, kind.values()))
    inner = getattr(kind, "feature", None)  # element type of a list
    return type(kind).__name__ in PLAIN if inner is None else _is_plain(inner)


def keep(rows: Any, staging: Path, folder: Path) -> None:
    """Move the files of a dataset to a folder, with their checksums, in one step."""
    staging.mkdir()
    files = [staging / f"{i:05}.arrow" for i in range(len(rows.cache_files))]
    for file, entry in zip(files, rows.cache_files, strict=True):
        os.replace(entry["filename"], file)
    write_sums(files, staging / SUMS)
    try:
        staging.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process stored the same rows first
            raise
