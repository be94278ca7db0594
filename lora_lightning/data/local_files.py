"""Lookup and reading of data files, with each text kept as written."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from lora_lightning.config.paths import absent
from lora_lightning.errors import UserError
from lora_lightning.utils.cache_folder import cache_folder
from lora_lightning.utils.output_folders import expanded

from .folders import HIDDEN, read_folder
from .json_files import json_as_written, read_json
from .readers import (
    BUILDERS,
    COMPRESSED,
    csv_as_written,
    is_known,
    plain_file,
    reason_of,
)
from .rows_cache import by_content
from .text_check import check_text, read_text

_ADVICE = {
    "csv": "Put double quotes around a text that holds the separator.",
    "json": "Each line must be an object with the same keys and types of values.",
    "parquet": "If it is another kind of file, rename it with that ending.",
}


def load_rows(option: str, path: Path) -> Any:
    """Return the rows of one file or folder. Messages name it by `option`."""
    return load_files(option, path, cache_folder())


def load_files(option: str, value: Any, cache: Path) -> Any:
    """Return the rows of the files, folders or patterns of a setting such as `data.train`."""
    from datasets import concatenate_datasets

    items = [expanded(str(item), option) for item in (value if _is_list(value) else [value])]
    paths = [path for item in items for path in _matching(option, item)]
    parts = [_load_path(option, path, cache) for path in paths]
    rows = parts[0]
    if len(parts) > 1:
        columns = [part.column_names for part in parts]
        if any(sorted(names) != sorted(columns[0]) for names in columns):
            pairs = zip(paths, columns, strict=True)
            raise UserError(
                f"{option}: the files must have the same columns. They have "
                f"{'; '.join(f'{path}: {names}' for path, names in pairs)}."
            )
        rows = concatenate_datasets(parts)
    if not len(rows):
        raise UserError(f"{option}: {', '.join(map(str, paths))} must hold rows.")
    _check_part_names(option, rows)
    return rows


def _check_part_names(option: str, rows: Any) -> None:
    """Raise UserError for a mapping with two parts of one name, which no Python object can hold.

    Arrow cuts names at a zero character, so different names in JSON may become equal.
    """

    def repeats_a_name(kind: Any) -> bool:
        parts = [kind.field(number) for number in range(kind.num_fields)]
        return len({part.name for part in parts}) < len(parts) or any(
            repeats_a_name(part.type) for part in parts
        )

    for column in rows.data.schema:
        if repeats_a_name(column.type):
            raise UserError(
                f"{option}: column {column.name!r} holds mappings with two keys of one name. "
                "Rename one."
            )


def _matching(option: str, path: Path) -> list[Path]:
    """Return the path itself, or the files that match it as a pattern.

    Raises:
        UserError: no file matches.
    """
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    found = [file for file in found if file.is_file() and not file.name.startswith(HIDDEN)]
    if not found:
        raise UserError(f"{option}={path}: no file matches. Give the path of a file.")
    return found


def _load_path(option: str, path: Path, cache: Path) -> Any:
    if not path.exists():
        raise absent(option, path)
    if path.is_dir():
        content = read_folder(option, path)
        return load_files(option, content, cache) if isinstance(content, list) else content
    if path.stat().st_size == 0:
        raise UserError(f"{option}={path}: is empty. Give a file with rows.")
    if not is_known(path):
        raise UserError(
            f"{option}={path}: must be a folder, or end in {', '.join(BUILDERS)}, optionally "
            f"followed by {', '.join(COMPRESSED)}."
        )
    return _read(option, path, cache)


def _read(option: str, path: Path, cache: Path) -> Any:
    with plain_file(option, path) as file:
        return _read_plain(option, path, file, cache)


def _read_plain(option: str, path: Path, file: Path, cache: Path) -> Any:
    """Return the rows of an uncompressed file. Messages name it by `path`."""
    from datasets import Dataset

    kind = file.suffix
    builder, kwargs = BUILDERS[kind]
    if builder == "text":
        text = read_text(option, path, file)
        return Dataset.from_dict({"text": text.removesuffix("\n").split("\n") if text else []})
    if kind == ".json":
        check_text(option, path, file)
        return read_json(option, path, file, cache)

    def check() -> None:
        if builder != "parquet":
            check_text(option, path, file)

    reader = {"csv": csv_as_written, "json": json_as_written, "parquet": Dataset.from_parquet}
    try:
        return by_content(reader[builder], file, cache, check=check, **kwargs)
    except UserError as error:
        if builder == "csv" and str(error).startswith("its "):
            raise UserError(f"{option}: {path}: {error}") from None
        raise
    except Exception as error:
        raise UserError(
            f"{option}: {path} cannot be read as {kind[1:].upper()}: {reason_of(error)} "
            f"{_ADVICE[builder]}"
        ) from error


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, Path)) and hasattr(value, "__iter__")
