"""Instantiation of objects that a config names by their class."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from lora_lightning.errors import UserError


def instantiate_all(nodes: DictConfig) -> list[Any]:
    """Build the objects that a group such as `callbacks` names. Entries set to null are skipped.

    Raises:
        UserError: see `instantiate_one`.
    """
    return [instantiate_one(nodes, name) for name, node in nodes.items() if node is not None]


def instantiate_one(nodes: DictConfig, name: Any) -> Any:
    """Build the object that an entry of a group names.

    Raises:
        UserError: the entry has no `_target_`, or its arguments do not fit.
    """
    from hydra.utils import instantiate

    node, key = nodes[name], nodes._get_full_key(name)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{key}: requires a _target_, the class to build. {key}=null removes it.")
    try:
        return instantiate(node)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(
            f"{key}: cannot be built from its _target_ {node._target_}: "
            f"{' '.join(str(cause).split())}{_path_hint(str(node._target_))} {key}=null removes it."
        ) from error


def _path_hint(target: str) -> str:
    """Return what to type if the class is in a file of this folder, where Python does not look."""
    name = target.partition(".")[0]
    if not name.isidentifier() or find_spec(name):  # it was found, so something else is wrong
        return ""
    if not (os.path.isfile(f"{name}.py") or os.path.isdir(name)):
        return ""
    return f" {name} is in this folder: type PYTHONPATH=. in front of the command."
