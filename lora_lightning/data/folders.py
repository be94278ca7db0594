"""Folders of data: tables, text files with one example each, and what `save_to_disk` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_lightning.config.untrusted import lies_elsewhere
from lora_lightning.errors import UserError
from lora_lightning.utils.terminal import is_text

from .readers import BUILDERS, is_known, kind_of, reason_of
from .rows_cache import stored
from .text_check import read_text

STATE, SPLITS_OF_SAVED = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes next to the rows of a dataset, and next to several splits."""


SPLITS_OF_FILES = ("train", "val|valid|validation|dev", "test")
"""Words in a file name that identify its split."""


ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "changes", "citation")
"""Names of texts that describe the data of their folder."""


HIDDEN = (".", "__MACOSX")
"""Name prefixes of files that an operating system has added."""


def read_folder(option: str, path: Path) -> Any:
    """Read a folder of tables, or of text files with one example each.

    Sub-folders name the label. Hidden files, files that a run has written, and texts about the
    data are ignored.

    Returns:
        The paths of the tables, or the rows of the texts.
    """
    from datasets import Dataset

    if (path / STATE).is_file():
        return load_saved(option, path)
    if (path / SPLITS_OF_SAVED).is_file():
        raise UserError(f"{option}={path}: holds several splits. Use data.path={path}.")
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
            f"{option}={path}: holds tables ({tables[0].name}) and texts "
            f"({files[0].relative_to(path)}). Name the files: {option}={path / tables[0].name}."
        )
    if tables:
        _check_links(option, path, tables)
        _check_splits(option, path, tables)
        return tables
    if not files:
        raise UserError(
            f"{option}={path}: the folder must hold .txt files or tables ({', '.join(BUILDERS)})."
        )
    _check_links(option, path, files)
    columns: dict[str, list[str]] = {"text": [read_text(option, file, file) for file in files]}
    if all(file.parent != path for file in files):
        columns["label"] = [file.relative_to(path).parts[0] for file in files]
        for name in sorted(set(columns["label"])):
            if not is_text(name):
                raise UserError(
                    f"{option}: the folder {str(path / name)!r} names a class, and its name must "
                    "be UTF-8. Rename it."
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
            raise ValueError("an old version of datasets wrote it, with indices")
        files = [path / name for name in names]
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside itself")
        _check_links(option, path, files)
        rows = Dataset.load_from_disk(str(path))
        return stored(rows.data, rows.info.copy(), rows.split, rows._fingerprint)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{option}: {path} cannot be read as a saved dataset: {reason_of(error)} "
            "Save it again with save_to_disk."
        ) from None


def _check_splits(option: str, path: Path, tables: list[Path]) -> None:
    """Raise UserError if the tables of a folder are splits, which would be used as one."""
    named = {file: kind for file in tables for kind in SPLITS_OF_FILES if _names(file, kind)}
    if len(set(named.values())) > 1:
        names = ", ".join(file.name for file in named)
        raise UserError(
            f"{option}={path}: holds several splits ({names}). Use data.path={path}, or name one "
            "file."
        )


def _names(file: Path, kind: str) -> bool:
    return re.search(rf"(?i)(^|[-_.])({kind})($|[-_.])", file.name) is not None


def _is_run_or_sweep(folder: Path) -> bool:
    """Return whether a folder in the data belongs to a run or sweep, whose logs are not data."""
    return any((folder / name).exists() for name in (".hydra", "sweep.json"))


def _check_links(option: str, folder: Path, files: list[Path]) -> None:
    """Raise UserError for a link out of a folder.

    The sender of a folder must not choose which other files are read.
    """
    for file in files:
        real = lies_elsewhere(file, folder)
        if real is not None:
            raise UserError(
                f"{option}: {file} is a link to {real}, outside its folder. Remove it, or replace "
                f"links by their files: cp -rL {folder} NEW_FOLDER."
            )
