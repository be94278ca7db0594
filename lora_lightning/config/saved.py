"""Reading of saved run configs, and refusal of those that may be somebody else's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.errors import UserError

from .groups import Schema
from .messages import explain
from .paths import FILES, MADE
from .schema import (
    OWN_GROUPS,
    TASK_ALIASES,
    TASK_CONFIGS,
)
from .untrusted import is_installed_attention

KNOWN_TARGETS = re.compile(
    r"lightning\.(pytorch|fabric)\.(callbacks|loggers|strategies|plugins|profilers|accelerators)\."
    r"|lora_lightning\.(callbacks|strategies|training\.callbacks|distributed)\."
    r"|torch\.optim\.|transformers\.(optimization\.|get_scheduler$)"
)
"""Modules with classes that a saved config may build without being typed again."""
WRITING_GROUPS = ("logger", "callbacks", "trainer")
"""Groups whose objects write files. Their classes are free, so any of their texts may be a path."""
ADDRESS = re.compile(r":[/\\]|::")
ELSEWHERE = re.compile(rf"^[/~\\]|(^|[/\\])\.\.([/\\]|$)|{ADDRESS.pattern}")
"""Texts that name an absolute path, a path through a parent folder, or an address."""
FOLDER_KEY = re.compile(r"(dir|dirpath|directory|folder|path|root)$")
"""Keys of these groups whose relative paths start from the working folder."""

RENAMED = {
    "lora_lightning.retention.Retention": "lora_lightning.callbacks.Retention",
    "lora_lightning.zero.ZeroStrategy": "lora_lightning.strategies.ZeroStrategy",
}
"""Current names of classes by their names in configs of runs before 0.1."""
ADDED = {"model": {"cpu_kernels": True}}
"""Settings that configs of runs before 0.1 lack, with the values that these runs had."""


def refuse_untyped(config: DictConfig, typed: list[str], source: str) -> list[str]:
    """Refuse a saved config that runs code of others, or reads more than itself.

    The folder's owner chose such settings. The caller types them again to allow them.

    Args:
        config: config as it was saved.
        typed: overrides of this command line.
        source: the folder as it was typed, for the message.

    Returns:
        The overrides that were typed but are not required.

    Raises:
        UserError: a required override was not typed.
    """
    asked: dict[str, str] = {}
    for resolve in (False, True):  # never resolve untyped reads beyond the config
        asked |= to_be_typed(config, resolve=resolve)
        if again := [item for item in asked if item not in typed]:
            raise UserError(
                f"{source}: its config {asked[again[0]]}. It may be of somebody else. If it is "
                f"yours, type it again: {source} {shlex.join(again)}"
            )
    return [item for item in typed if item not in asked]


def to_be_typed(config: DictConfig, *, resolve: bool = True) -> dict[str, str]:
    """Return the overrides that must be typed again to resume a run, with the effect of each.

    They cover classes outside of Lightning, torch and this package, and code that comes with a base
    model. They also cover interpolations that call something, such as `${oc.env:NAME}`, and folders
    and addresses outside of the run's folder that the run would write to.

    Args:
        config: config as it was saved.
        resolve: whether to resolve interpolations and check their values too (default: True).

    Raises:
        UserError: an interpolation cannot be resolved.
    """
    found: dict[str, str] = {}
    raw = dict(leaves(OmegaConf.to_container(config, resolve=False)))
    for key, value in raw.items():
        if _calls(value) and key != "output_dir":  # set by resume=
            found[f"{key}={value}"] = f"takes {key} from {value}"
    try:
        values = dict(leaves(OmegaConf.to_container(config, resolve=True))) if resolve else raw
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    run_dir = Path(str(values["output_dir"]))
    for key, value in values.items():
        if isinstance(value, str) and "${" in value:
            continue
        does = _runs(key, value) or _writes(key, value, run_dir)
        if does is not None:
            shown = str(value).lower() if isinstance(value, bool) else value
            found[f"{key}={shown}"] = does
    return found


def _runs(key: str, value: Any) -> str | None:
    """Return what a setting runs that may be code of others, or None if nothing."""
    if key.rpartition(".")[2] == "_target_" and value is not None and not _is_known(value):
        return (
            f"builds {key.removesuffix('._target_')} from {value}, which is not a class of "
            "Lightning, torch.optim or lora_lightning"
        )
    if key == "model.trust_remote_code" and value:
        return "runs Python code that comes with its base model"
    if key == "model.attn_implementation" and value and not is_installed_attention(value):
        return f"takes attention kernels from elsewhere: {value}"
    return None


def _writes(key: str, value: Any, run_dir: Path) -> str | None:
    """Return where a setting makes a run write outside of its folder, or None if nowhere."""
    if not isinstance(value, str) or (key in FILES and key not in MADE):
        return None
    group, name = key.partition(".")[0], re.sub(r"(\.\d+)+$", "", key).rpartition(".")[2]
    is_path = group in WRITING_GROUPS and (FOLDER_KEY.search(name) or ELSEWHERE.search(value))
    if (is_path or key in MADE) and not _is_inside(value, run_dir):
        return f"writes to {value} ({key}), outside of the run's folder"
    return None


def _is_inside(value: str, folder: Path) -> bool:
    """Return whether a path is a folder or inside of it. An address never is."""
    try:
        path = Path(value).expanduser().resolve()
        return not ADDRESS.search(value) and path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # no such home folder, links in a ring
        return False


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested dicts and lists, each with its value."""
    if not isinstance(node, (dict, list)):
        yield key, node
        return
    for name, part in node.items() if isinstance(node, dict) else enumerate(node):
        if name == "_target_" and isinstance(part, (dict, list)):
            part = str(part)
        yield from leaves(part, f"{key}.{name}" if key else str(name))


def _calls(value: Any) -> bool:
    """Return whether a value holds an interpolation that calls a resolver.

    An interpolation that only refers to another setting does not count.
    """
    text = value if isinstance(value, str) else ""
    while (less := re.sub(r"\$\{[^${}:]*\}", "", text)) != text:
        text = less
    return "${" in text


def _is_known(target: Any) -> bool:
    """Return whether a `_target_` is a class that a resumed run may build."""
    if not isinstance(target, str) or not KNOWN_TARGETS.match(target):
        return False
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:
        return False
    home = f"{getattr(found, '__module__', '')}."  # attributes may come from another module
    schedule = home == "transformers.optimization." and callable(found)
    return bool(schedule or (isinstance(found, type) and KNOWN_TARGETS.match(home)))


def read_yaml(path: Path) -> Any:
    """Read a file that Hydra wrote, with its interpolations unresolved.

    Raises:
        UserError: the file is absent or broken.
    """
    try:
        return OmegaConf.load(path)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    except Exception as error:  # yaml errors have no common base that is worth importing
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None


def read_config(path: Path) -> DictConfig:
    """Read a config that a run saved.

    Raises:
        UserError: the file is absent or broken.
    """
    config = read_yaml(path)
    names = [key.name for key in fields(Schema)]
    if not isinstance(config, DictConfig) or not config.keys() >= set(names):
        of = config.keys() if isinstance(config, DictConfig) else ()
        raise UserError(
            f"{path} is not the config of a run, or it is damaged (it has no "
            f"{next(name for name in names if name not in of)}). If it is of a job of a sweep, "
            "run the sweep's command again, which writes it again."
        )
    return config


def read_run_config(path: Path) -> DictConfig:
    """Read a config that a run saved, with the values of our own groups in their declared types.

    Raises:
        UserError: the file is absent or broken, or a value has the wrong type.
    """
    config = read_config(path)
    schema = OmegaConf.structured(Schema)
    try:
        for group in (*OWN_GROUPS, "trainer", "logger", "callbacks"):
            if not isinstance(config[group], DictConfig):
                raise UserError(f"{group} is no mapping")
        for node in (*config.callbacks.values(), config.trainer.get("strategy")):
            if isinstance(node, DictConfig) and node.get("_target_") in RENAMED:
                node._target_ = RENAMED[node._target_]
        name = config.task.get("name")
        config.task.name = name = TASK_ALIASES.get(name, name)
        if not isinstance(name, str) or name not in TASK_CONFIGS:
            raise UserError(f"task.name={name}: there is no such task")
        schema.task = OmegaConf.structured(TASK_CONFIGS[name])
        merged = OmegaConf.merge(schema, config)
    except Exception as error:
        raise not_a_runs(path, error) from None
    assert isinstance(merged, DictConfig)
    return merged


def not_a_runs(path: Path, error: Exception) -> UserError:
    """Return the error for a saved config that holds a value of the wrong type.

    Args:
        path: file with the config.
        error: error that its value caused.
    """
    where = re.search(r"full_key: (\S+)", str(error))
    told = explain(error).partition(" full_key:")[0].rstrip(".")[:600]
    key = f"{where[1]}: " if where and where[1] not in told else ""
    return UserError(f"{path} does not hold what a run saves: {key}{told or repr(error)}.")


def read_overrides(path: Path) -> list[str]:
    """Read the overrides that a run saved. A missing file gives an empty list.

    Raises:
        UserError: the file is broken.
    """
    if not path.is_file():
        return []
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(saved, list):
            raise TypeError("it holds no list")
        overrides = [str(item) for item in saved]
        for item in OverridesParser.create().parse_overrides(overrides):
            item.get_value_element_as_str()  # fails for several values, and a run has one of each
    except Exception as error:  # yaml errors have no common base that is worth importing
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}.") from None
    return overrides
