"""Where rows come from: text that ships with the package, local files, or a hub dataset."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_lightning.config.paths import absent
from lora_lightning.config.schema import DataConfig
from lora_lightning.config.untrusted import lies_elsewhere
from lora_lightning.errors import UserError, causes, did_you_mean
from lora_lightning.utils.output_folders import digest, expanded
from lora_lightning.utils.terminal import is_text, say

from .cache import is_whole, tell_damage, write_sums
from .docstrings import docstring_files
from .readers import (
    BUILDERS,
    COMPRESSED,
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

SPLITS = ("train", "val", "test")
SUMS = "sums.json"
REMOTE = ("hf://", "https://", "http://")
"""Where the files of a data set of the hub lie."""
DESCRIPTIONS = ("README.md", "dataset_infos.json", ".huggingface.yaml")
"""Files beside a data set that say which of its files make which split, and of which types."""
READERS = 2
"""Counts changes of what our readers make of the same file."""
_ADVICE = {
    "csv": "A text that holds the separator must stand in double quotes.",
    "json": "Each line must be an object with the same keys and types of values.",
    "parquet": "Is it another kind of file? The ending must tell.",
}
EMBEDDED = Path(__file__).parent / "embedded"
MADE = {"docstrings": docstring_files}
"""Embedded data that is made on the user's machine: writes its files to a folder."""
STATE, SPLITS_OF_SAVED = "state.json", "dataset_dict.json"
"""What `save_to_disk` writes beside the rows of a data set, and beside several splits."""
SPLITS_OF_FILES = ("train", "val|valid|validation|dev", "test")
"""Words in a file's name that say which split it is."""
ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "changes", "citation")
"""Texts in a folder that are about its data."""
HIDDEN = (".", "__MACOSX")
"""What the names of files begin with that a system has put there."""
PLAIN = ("Value", "ClassLabel", "Json", "Translation", "TranslationVariableLanguages")
"""Kinds of columns of `datasets` whose values stand in the rows; others may name files and URLs."""


def load_splits(config: DataConfig) -> dict[str, Any]:
    """Raw rows as `datasets.Dataset`, by split; only the splits that exist.

    Raises:
        UserError: a file is missing, empty or malformed, or the hub dataset cannot be had.
    """
    files = {split: getattr(config, split) for split in SPLITS if getattr(config, split)}
    if files and config.path:
        raise UserError("give either files (data.train=...) or a hub dataset (data.path=...).")
    if files:
        cache = cache_folder(config.cache_dir)
        return {split: _load_files(f"data.{split}", value, cache) for split, value in files.items()}
    if config.path:
        return _load_hub(config, cache_folder(config.cache_dir))
    if config.embedded:
        return _load_embedded(config)
    raise UserError("there is no data: give data.train=FILE, or data.path=HUB_NAME.")


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


def load_rows(option: str, path: Path) -> Any:
    """The rows of one file or folder; `option` is what messages call it."""
    return _load_files(option, path, cache_folder(None))


def _load_embedded(config: DataConfig) -> dict[str, Any]:
    name, cache = str(config.embedded), cache_folder(config.cache_dir)
    shipped = {path.name for path in EMBEDDED.iterdir() if path.is_dir()}
    if name in MADE:
        try:
            paths = MADE[name](cache)
        except OSError as error:
            raise unwritable_cache(cache, error) from None
    elif name in shipped:
        paths = {split: EMBEDDED / name / f"{split}.jsonl" for split in SPLITS}
    else:
        known = sorted(shipped | set(MADE))
        raise UserError(
            f"data.embedded={name}: there is no such data set.{did_you_mean(name, known)} "
            f"Known: {', '.join(known)}."
        )
    return {split: _load_files(name, path, cache) for split, path in paths.items()}


def _load_hub(config: DataConfig, cache: Path) -> dict[str, Any]:
    path = expanded(str(config.path), "data.path")
    try:
        if (path / SPLITS_OF_SAVED).is_file():
            found = _splits_of_saved(config, path)
        elif (path / STATE).is_file():
            found = {"train": _load_saved(f"data.path={path}", path)}
        else:
            found = _splits_of_folder(path, config, cache) if path.is_dir() else _hub(config, cache)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.path={config.path}: the hub dataset cannot be loaded: {reason_of(error)} "
            "Check the name, data.name and the network; for local files use data.train=FILE."
        ) from error
    if config.splits:
        for split in config.splits.values():
            if split not in found:
                raise UserError(
                    f"data.splits: {config.path} has no split {split!r}."
                    f"{did_you_mean(split, found)} Its splits are {', '.join(found)}."
                )
        return {ours: found[theirs] for ours, theirs in config.splits.items()}
    renamed = {"train": "train", "validation": "val", "val": "val", "dev": "val", "test": "test"}
    return {renamed[split]: rows for split, rows in found.items() if split in renamed}


def _splits_of_saved(config: DataConfig, path: Path) -> dict[str, Any]:
    names = json.loads((path / SPLITS_OF_SAVED).read_text(encoding="utf-8"))["splits"]
    if not isinstance(names, list) or any(Path(str(name)).name != name for name in names):
        raise UserError(f"data.path={config.path}: its {SPLITS_OF_SAVED} is damaged.")
    return {name: _load_saved(f"data.path={config.path}", path / name) for name in names}


def _hub(config: DataConfig, cache: Path) -> dict[str, Any]:
    """The splits of a data set of the hub, whose cache is checked and made again if damaged."""
    from datasets import load_dataset_builder

    def fetch(**how: Any) -> Any:
        builder = load_dataset_builder(str(config.path), config.name, revision=config.revision)
        # Of a chain (zip://a.csv::hf://...) the last part is where the file lies.
        _refuse_elsewhere(config, builder, lambda file: file.split("::")[-1].startswith(REMOTE))
        guesses = builder.name == "csv" and _is_plain_set(builder)
        builder.download_and_prepare(**how)
        rows = builder.as_dataset()
        if guesses:
            _tell_numbers(config, rows)
        return rows

    found = fetch()
    files = sorted({Path(part["filename"]) for rows in found.values() for part in rows.cache_files})
    key = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()[:32]
    sums = cache / f"hub-{key}.json"
    if sums.exists() and not is_whole(files, sums):
        tell_damage(files[0].parent)
        before = [digest(file) for file in files]
        found = fetch(download_mode="reuse_cache_if_exists")
        if [digest(file) for file in files] == before:
            raise UserError(
                f"data.path={config.path}: its rows in {files[0].parent} are damaged, and nothing "
                "is there to make them again from. Delete that folder, and run with a network."
            )
        sums.unlink()
    if files and not sums.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_sums(files, sums)
        except OSError as error:
            raise unwritable_cache(cache, error) from None
    return {
        split: _stored(rows.data, rows.info.copy(), rows.split, rows._fingerprint)
        for split, rows in found.items()
    }


def _tell_numbers(config: DataConfig, found: Any) -> None:
    """Says which columns of a table of the hub `datasets` has taken for numbers and the like."""
    kinds = next(iter(found.values())).features
    texts = ("string", "large_string")
    guessed = [name for name, kind in kinds.items() if getattr(kind, "dtype", "") not in texts]
    if guessed:
        say(
            f"data.path={config.path} is a table without types, and {', '.join(guessed)} was read "
            "as numbers, truth or times: 01 is 1 there, and 0.10 is 0.1. To have cells as they are "
            "written download the set, and give its folder: data.path=FOLDER.",
            file=sys.stderr,
        )


def _splits_of_folder(path: Path, config: DataConfig, cache: Path) -> dict[str, Any]:
    """The splits of a folder that is laid out like a data set of the hub, kept by content."""
    from datasets import __version__, load_dataset_builder

    inside = path.resolve()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_cache(cache, error) from None
    with tempfile.TemporaryDirectory(dir=cache, prefix=".set-") as work:
        builder = load_dataset_builder(str(inside), config.name, cache_dir=work)
        files = _refuse_elsewhere(
            config, builder, lambda file: lies_elsewhere(Path(file), inside) is None
        )
        if _is_plain_set(builder):
            return {
                str(split): _load_files(f"data.path={path}", sorted(map(str, names)), cache)
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
        absent = [split for split, folder in kept.items() if not _is_kept(folder)]
        if absent:
            builder.download_and_prepare()
            for number, split in enumerate(absent):
                shutil.rmtree(kept[split], ignore_errors=True)
                _keep(builder.as_dataset(split), Path(work) / f"kept-{number}", kept[split])
    return {split: _kept_rows(folder, keys[split]) for split, folder in kept.items()}


def _is_plain_set(builder: Any) -> bool:
    """Whether a folder's files are tables of text that nothing describes: our readers take them.

    Those of `datasets` guess the types of their cells.
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


def _refuse_elsewhere(
    config: DataConfig, builder: Any, belongs: Callable[[str], bool]
) -> list[str]:
    """The files of a data set, of which its description may name any on the user's machine.

    Raises:
        UserError: one does not belong to it.
    """
    splits = (builder.config.data_files or {}).values()
    files = [str(file) for split in splits for file in split]
    for file in files:
        if not belongs(file):
            raise UserError(
                f"data.path={config.path} names {file}, which is no part of it. If you want it "
                "read, give it yourself: data.train=FILE."
            )
    return files


def _load_files(option: str, value: Any, cache: Path) -> Any:
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
    """Raises UserError for a mapping with two parts of one name, which no Python object can hold.

    Arrow cuts names at a zero character, so that those of JSON may become alike.
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
    """The path itself, or the files that it is a pattern for.

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
    """The rows of a file without compression; messages call it `path`."""
    from datasets import Dataset

    kind = file.suffix
    builder, kwargs = BUILDERS[kind]
    if builder == "text":
        text = read_text(option, path, file)
        return Dataset.from_dict({"text": text.removesuffix("\n").split("\n") if text else []})
    if builder != "parquet":
        check_text(option, path, file)
    if kind == ".json":
        return _read_json(option, path, file, cache)
    reader = {"csv": csv_as_written, "json": json_as_written, "parquet": Dataset.from_parquet}
    try:
        return _by_content(reader[builder], file, cache, **kwargs)
    except UserError as error:
        if builder == "csv" and str(error).startswith("its "):
            raise UserError(f"{option}: {path}: {error}") from None
        raise
    except Exception as error:
        raise UserError(
            f"{option}: {path} is not readable as {kind[1:].upper()}: {reason_of(error)} "
            f"{_ADVICE[builder]}"
        ) from error


def _by_content(reader: Callable[..., Any], path: Path, cache: Path, **kwargs: Any) -> Any:
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
        if not _is_kept(folder):
            shutil.rmtree(folder, ignore_errors=True)
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}-") as work:
                rows = reader(str(path), cache_dir=work, **kwargs)
                _keep(rows, Path(work) / "kept", folder)
    except Exception as error:
        cause = causes(error)[-1]
        # pyarrow tells of a damaged file by an OSError too, without a number of the system's.
        if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT):
            raise unwritable_cache(cache, cause) from None
        raise
    return _kept_rows(folder, key)


def _is_kept(folder: Path) -> bool:
    """Whether rows are in a folder and whole; damage is told."""
    whole = is_whole(folder.glob("*.arrow"), folder / SUMS)
    if not whole and (folder / SUMS).exists():
        tell_damage(folder)
    return whole


def _kept_rows(folder: Path, key: str) -> Any:
    """The rows that `_keep` has put into a folder; `key` tells them apart from others."""
    from datasets import DatasetInfo, Features
    from datasets.table import MemoryMappedTable, concat_tables

    # A Dataset made from another describes all its columns again, and there may be thousands.
    table = concat_tables(
        [MemoryMappedTable.from_file(str(p)) for p in sorted(folder.glob("*.arrow"))]
    )
    info = DatasetInfo(features=Features.from_arrow_schema(table.schema))
    return _stored(table, info, None, key)


def _stored(table: Any, info: Any, split: Any, fingerprint: str) -> Any:
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


def _keep(rows: Any, made: Path, folder: Path) -> None:
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


def _read_json(option: str, path: Path, file: Path, cache: Path) -> Any:
    """A .json file: a list of objects, an object of columns, or one object a line."""
    from datasets import Dataset

    try:
        text = file.read_text(encoding="utf-8")
        content = _table(json.loads(text))
    except (ValueError, RecursionError):
        return _read_as_lines(option, path, file, cache)
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
    """A list of objects, also where it is the one value of an object; else the content itself."""
    if isinstance(content, dict) and len(content) == 1:
        (value,) = content.values()
        if isinstance(value, list) and all(isinstance(row, dict) for row in value):
            return value
    return content


def _keep_numbers(content: Any, raw: Any) -> None:
    """Puts texts, as they are written, into columns with numbers that Python writes otherwise."""
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
        return _by_content(json_as_written, file, cache)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{option}: {path} is not readable as JSON: {reason_of(error)}") from error


def _load_folder(option: str, path: Path, cache: Path) -> Any:
    """A folder of tables, or of text files, one example each; sub-folders name the label.

    Hidden files, what a run has written, and texts about the data are none of it.
    """
    from datasets import Dataset

    if (path / STATE).is_file():
        return _load_saved(option, path)
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
    if files:  # beside texts an object of JSON may be about anything
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
        return _load_files(option, tables, cache)
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


def _load_saved(option: str, path: Path) -> Any:
    """The rows of a folder that `Dataset.save_to_disk` has written.

    Raises:
        UserError: it is damaged, or names files that are not in it.
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
        return _stored(rows.data, rows.info.copy(), rows.split, rows._fingerprint)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{option}: {path} is not readable as what save_to_disk writes: {reason_of(error)} "
            "Save it again."
        ) from None


def _refuse_splits(option: str, path: Path, tables: list[Path]) -> None:
    """Raises UserError where the tables of a folder are its splits: one would be learned."""
    named = {file: kind for file in tables for kind in SPLITS_OF_FILES if _names(file, kind)}
    if len(set(named.values())) > 1:
        raise UserError(
            f"{option}: the folder {path} holds splits ({', '.join(f.name for f in named)}), and "
            f"all of them would be {option}. Give data.path={path}, which takes each for its own."
        )


def _names(file: Path, kind: str) -> bool:
    return re.search(rf"(?i)(^|[-_.])({kind})($|[-_.])", file.name) is not None


def _is_run_or_sweep(folder: Path) -> bool:
    """Whether a folder among data is one of a run or a sweep, whose logs are no data."""
    return any((folder / name).exists() for name in (".hydra", "sweep.json"))


def _refuse_links(option: str, folder: Path, files: list[Path]) -> None:
    """Raises UserError for a link out of a folder: who sent it may not choose what is read."""
    for file in files:
        real = lies_elsewhere(file, folder)
        if real is not None:
            raise UserError(
                f"{option}: {file} is a link to {real}, outside of its folder. Take it away, or "
                f"put the file itself in its place: cp -rL {folder} NEW_FOLDER."
            )


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, Path)) and hasattr(value, "__iter__")
