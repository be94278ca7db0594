"""Lookup and reading of data files, with each text kept as written."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any

from lora_lightning.config.paths import absent
from lora_lightning.config.untrusted import lies_elsewhere
from lora_lightning.errors import UserError
from lora_lightning.utils.cache_folder import cache_folder
from lora_lightning.utils.output_folders import expanded
from lora_lightning.utils.terminal import is_text

from .readers import (
    BUILDERS,
    COMPRESSED,
    MAY_LOSE,
    as_written,
    check_text,
    csv_as_written,
    is_known,
    is_odd,
    json_as_written,
    kind_of,
    plain_file,
    read_text,
    reason_of,
    with_numbers,
)
from .rows_cache import by_content, stored

_ADVICE = {
    "csv": "A text that holds the separator must stand in double quotes.",
    "json": "Each line must be an object with the same keys and types of values.",
    "parquet": "Is it another kind of file? The ending must tell.",
}


STATE, SPLITS_OF_SAVED = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes next to the rows of a dataset, and next to several splits."""


SPLITS_OF_FILES = ("train", "val|valid|validation|dev", "test")
"""Words in a file name that identify its split."""


ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "changes", "citation")
"""Names of texts that describe the data of their folder."""


HIDDEN = (".", "__MACOSX")
"""Name prefixes of files that an operating system has added."""


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
            shown = "; ".join(
                f"{path}: {names}" for path, names in zip(paths, columns, strict=True)
            )
            raise UserError(f"{option}: the files must have the same columns, but differ. {shown}.")
        rows = concatenate_datasets(parts)
    if not len(rows):
        raise UserError(f"{option}: {', '.join(map(str, paths))} holds no rows.")
    _refuse_twins(option, rows)
    return rows


def _refuse_twins(option: str, rows: Any) -> None:
    """Raise UserError for a mapping with two parts of one name, which no Python object can hold.

    Arrow cuts names at a zero character, so different names in JSON may become equal.
    """

    def has_twins(kind: Any) -> bool:
        parts = [kind.field(number) for number in range(kind.num_fields)]
        return len({part.name for part in parts}) < len(parts) or any(
            has_twins(part.type) for part in parts
        )

    for column in rows.data.schema:
        if has_twins(column.type):
            raise UserError(
                f"{option}: the column {column.name!r} holds mappings with two parts of one name. "
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
        raise UserError(f"{option}: no file matches {path}. Give the path of a file.")
    return found


def _load_path(option: str, path: Path, cache: Path) -> Any:
    if not path.exists():
        raise absent(option, path)
    if path.is_dir():
        return _load_folder(option, path, cache)
    if path.stat().st_size == 0:
        raise UserError(f"{option}: {path} is empty. Give a file that holds rows.")
    if not is_known(path):
        raise UserError(
            f"{option}: {path} has no known ending. Known: {', '.join(BUILDERS)}, these with "
            f"{', '.join(COMPRESSED)} behind them, or a folder."
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
        return _read_json(option, path, file, cache)

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
            f"{option}: {path} is not readable as {kind[1:].upper()}: {reason_of(error)} "
            f"{_ADVICE[builder]}"
        ) from error


def _read_json(option: str, path: Path, file: Path, cache: Path) -> Any:
    """Read a .json file with a list of objects, an object of columns, or one object per line."""
    from datasets import Dataset

    try:
        text = file.read_text(encoding="utf-8")
        content = _table(json.loads(text))
    except (ValueError, RecursionError):
        return _read_as_lines(option, path, file, cache)
    if MAY_LOSE.search(text.encode()):
        _keep_numbers(content, _table(with_numbers(text)))
    try:
        if isinstance(content, list):
            return Dataset.from_list(content)
        return Dataset.from_dict(content)
    except Exception as error:
        raise UserError(
            f"{option}: {path} must hold a list of objects with the same keys: {reason_of(error)}"
        ) from error


def _table(content: Any) -> Any:
    """Return the list of objects that is an object's only value, or else the content itself."""
    if isinstance(content, dict) and len(content) == 1:
        (value,) = content.values()
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            return value
    return content


def _keep_numbers(content: Any, raw: Any) -> None:
    """Convert columns to text as written, in place, if Python writes their numbers differently."""
    if isinstance(content, dict):
        for name, values in raw.items():
            if isinstance(values, list) and any(map(is_odd, values)):
                content[name] = [as_written(value) for value in values]
        return
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        return
    odd = {name for row in raw for name, value in row.items() if is_odd(value)}
    for row, written in zip(content, raw, strict=True):
        row |= {name: as_written(written[name]) for name in odd if name in written}


def _read_as_lines(option: str, path: Path, file: Path, cache: Path) -> Any:
    try:
        return by_content(json_as_written, file, cache)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option}: {path} is not readable as JSON: {reason_of(error)}") from error


def _load_folder(option: str, path: Path, cache: Path) -> Any:
    """Read a folder of tables, or of text files with one example each.

    Sub-folders name the label. Hidden files, files that a run has written, and texts about the
    data are ignored.
    """
    from datasets import Dataset

    if (path / STATE).is_file():
        return load_saved(option, path)
    if (path / SPLITS_OF_SAVED).is_file():
        raise UserError(f"{option}: {path} holds several splits: give data.path={path} instead.")
    found = sorted(file for file in path.rglob("*.txt") if file.is_file())
    inner = {folder for file in found for folder in file.parents if path in folder.parents}
    own = {folder for folder in inner if _is_run_or_sweep(folder)}
    files = [
        file
        for file in found
        if not own.intersection(file.parents)
        and not any(part.startswith(HIDDEN) for part in file.relative_to(path).parts)
        and not (file.parent == path and file.stem.lower() in ABOUT)
    ]
    tables = sorted(
        file
        for file in path.iterdir()
        if is_known(file) and kind_of(file)[0] != ".txt" and not file.name.startswith(HIDDEN)
    )
    if files:  # next to texts, a JSON object may be about anything
        tables = [file for file in tables if kind_of(file)[0] != ".json"]
    if tables and files:
        raise UserError(
            f"{option}: the folder {path} holds tables ({tables[0].name}) and texts "
            f"({files[0].relative_to(path)}): name the files that are meant, "
            f"{option}={path / tables[0].name}."
        )
    if tables:
        _refuse_links(option, path, tables)
        _refuse_splits(option, path, tables)
        return load_files(option, tables, cache)
    if not files:
        raise UserError(
            f"{option}: the folder {path} holds no .txt files and no data files "
            f"({', '.join(BUILDERS)})."
        )
    _refuse_links(option, path, files)
    columns: dict[str, list[str]] = {"text": [read_text(option, file, file) for file in files]}
    if all(file.parent != path for file in files):
        columns["label"] = [file.relative_to(path).parts[0] for file in files]
        for name in sorted(set(columns["label"])):
            if not is_text(name):
                raise UserError(
                    f"{option}: the folder {str(path / name)!r} names a class, and its name is not "
                    "UTF-8: rename it."
                )
    return Dataset.from_dict(columns)


def load_saved(option: str, path: Path) -> Any:
    """Return the rows of a folder that `Dataset.save_to_disk` has written.

    Raises:
        UserError: the folder is damaged, or names files outside itself.
    """
    from datasets import Dataset

    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("it is of an old version of datasets, with indices")
        files = [path / name for name in names]
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside of itself")
        _refuse_links(option, path, files)
        rows = Dataset.load_from_disk(str(path))
        return stored(rows.data, rows.info.copy(), rows.split, rows._fingerprint)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{option}: {path} is not readable as what save_to_disk writes: {reason_of(error)} "
            "Save it again."
        ) from None


def _refuse_splits(option: str, path: Path, tables: list[Path]) -> None:
    """Raise UserError if the tables of a folder are splits, which would be used as one."""
    named = {file: kind for file in tables for kind in SPLITS_OF_FILES if _names(file, kind)}
    if len(set(named.values())) > 1:
        raise UserError(
            f"{option}: the folder {path} holds splits ({', '.join(f.name for f in named)}), and "
            f"all of them would be {option}. Give data.path={path}, which takes each for its own."
        )


def _names(file: Path, kind: str) -> bool:
    return re.search(rf"(?i)(^|[-_.])({kind})($|[-_.])", file.name) is not None


def _is_run_or_sweep(folder: Path) -> bool:
    """Return whether a folder in the data belongs to a run or sweep, whose logs are not data."""
    return any((folder / name).exists() for name in (".hydra", "sweep.json"))


def _refuse_links(option: str, folder: Path, files: list[Path]) -> None:
    """Raise UserError for a link out of a folder.

    The sender of a folder must not choose which other files are read.
    """
    for file in files:
        real = lies_elsewhere(file, folder)
        if real is not None:
            raise UserError(
                f"{option}: {file} is a link to {real}, outside of its folder. Take it away, or "
                f"put the file itself in its place: cp -rL {folder} NEW_FOLDER."
            )


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, Path)) and hasattr(value, "__iter__")
