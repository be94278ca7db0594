"""Lookup of presets in the package's own conf/ and in folders that a command line names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lora_lightning.errors import UserError

CONFIG_MODULE = "lora_lightning.conf"
CONFIG_NAME = "train"
SEARCH = "hydra.searchpath="
_FLAGS = {
    **dict.fromkeys(("--config-dir", "-cd"), "folder"),
    **dict.fromkeys(("--config-path", "-cp"), "path"),
    **dict.fromkeys(("--config-name", "-cn"), "name"),
}


@dataclass
class Primary:
    """Config that all others are composed into.

    Args:
        folder: folder of the config. "" (default) means the package or the search path.
        name: name of its file without the ending (default: train).
    """

    folder: str = ""
    name: str = CONFIG_NAME

    @property
    def source(self) -> str:
        """Folder in the form that `hydra.main` takes."""
        return self.folder or f"pkg://{CONFIG_MODULE}"

    @contextmanager
    def initialized(self) -> Iterator[None]:
        """Make Hydra compose from here within the block."""
        begun = (
            initialize_config_dir(self.folder, version_base="1.3")
            if self.folder
            else initialize_config_module(CONFIG_MODULE, version_base="1.3")
        )
        with begun:
            yield


primary = Primary()
"""Primary config of this process. `with_presets` sets it from the command line."""


def with_presets(arguments: list[str]) -> list[str]:
    """Return arguments with one `hydra.searchpath=[...]` instead of Hydra's flags for folders.

    Every verb and every job of a sweep then finds the same presets. Folders are made absolute,
    because a run may be resumed from elsewhere. The ~ of a value such as ~/data is expanded. No
    shell expands it after a =, and in Hydra's grammar it means something else.

    Raises:
        UserError: a flag lacks its value, or a folder does not exist.
    """
    arguments = [_from_home(argument) for argument in arguments]
    rest: list[str] = []
    found: dict[str, list[str]] = {"folder": [], "path": [], "name": []}
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag not in _FLAGS:
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value or (value.startswith("-") and not equals):
            raise UserError(f"{flag}: requires a value: {flag} {_FLAGS[flag].upper()}.")
        found[_FLAGS[flag]].append(value)
    primary.folder = primary.name = ""
    if found["path"]:
        primary.folder = _folder(found["path"][-1], "--config-path").removeprefix("file://")
    primary.name = found["name"][-1] if found["name"] else CONFIG_NAME
    entries = [_folder(folder, "--config-dir") for folder in found["folder"]]
    typed = [item for item in rest if item.startswith(SEARCH)]
    entries += [_absolute(entry) for item in typed for entry in _entries(item)]
    folders = [entry.removeprefix("file://") for entry in entries]
    if found["name"] and not primary.folder:  # Hydra looks for it in one place only
        holders = (f for f in folders if (Path(f) / f"{primary.name}.yaml").is_file())
        primary.folder = next(holders, "")
    if primary.folder:
        entries.append(f"pkg://{CONFIG_MODULE}")
    rest = [item for item in rest if item not in typed]
    if not entries:
        return rest
    # Put it next to the other overrides. Hydra's parser wants flags before or after all of them.
    first = (i for i, item in enumerate(rest) if "=" in item and not item.startswith("-"))
    place = next(first, len(rest))
    return [*rest[:place], search_override(entries), *rest[place:]]


def search_override(entries: Sequence[str]) -> str:
    """Return the override that sets a search path."""
    quoted = ",".join("'" + entry.replace("'", "\\'") + "'" for entry in dict.fromkeys(entries))
    return f"{SEARCH}[{quoted}]"


def searched(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that set a search path."""
    return [item for item in overrides if item.startswith(SEARCH)]


def choices(group: str, overrides: Sequence[str] = ()) -> list[str]:
    """Return the names of a group's presets in the package and on the search path."""
    own = files(CONFIG_MODULE).joinpath(group)
    folders: list[Any] = [own] if own.is_dir() else []
    entries = [entry for item in searched(overrides) for entry in _entries(item)]
    for entry in [*entries, *([primary.folder] if primary.folder else [])]:
        folder = Path(entry.removeprefix("file://")) / group
        folders += [folder] if not entry.startswith("pkg://") and folder.is_dir() else []
    names = {each.name for folder in folders for each in folder.iterdir()}
    return sorted(name[:-5] for name in names if name.endswith(".yaml"))


def preset_table(searchpath: Sequence[str] = ()) -> str:
    """Return a line with the choices of each group of presets, for `train --help`."""
    groups = (each.name for each in files(CONFIG_MODULE).iterdir() if each.is_dir())
    overrides = [search_override(searchpath)] if searchpath else []
    return "\n".join(
        f"{group}: {', '.join(names)}"
        for group in sorted(groups)
        if group != "hydra" and (names := choices(group, overrides))
    )


def _entries(override: str) -> list[str]:
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise UserError(f"{override} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, list):
        raise UserError(f"{override}: must be a list of folders: 'hydra.searchpath=[FOLDER]'.")
    return [str(entry) for entry in value]


def _absolute(entry: str) -> str:
    return entry if entry.startswith("pkg://") else _folder(entry, "hydra.searchpath")


def _from_home(argument: str) -> str:
    found = re.fullmatch(r"(?!resume=)(\+*[\w.]+=)(~[^'\"\[\]{},]*)", argument)
    if not found:
        return argument
    home = re.match(r"~[^/]*", found[2])
    path = os.path.expanduser(found[2]) if home and found[2] != home[0] else found[2]
    return f"{found[1]}'{path}'"


def _folder(given: str, setting: str) -> str:
    path = Path(given.removeprefix("file://")).expanduser()
    if not path.is_dir():
        raise UserError(f"{setting}={given}: folder not found.")
    return f"file://{os.path.abspath(path)}"
