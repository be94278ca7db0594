"""Error messages for mistakes in a config or on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from lora_lightning.errors import UserError, causes, did_you_mean

from .groups import composed
from .presets import choices


def explain(error: Exception, chosen: list[str] | None = None) -> str:
    """Return a Hydra error as one short message that names the nearest right key.

    Args:
        error: error that Hydra or OmegaConf raised.
        chosen: overrides that decide which keys and presets exist, such as task=lm (default: none).
    """
    chain = causes(error)
    lines = [line.strip() for item in chain for line in str(item).splitlines() if line.strip()]
    text = " ".join(dict.fromkeys(lines))
    message = next((str(item) for item in chain if isinstance(item, UserError)), None)
    message = message or _unresolved(str(error)) or _several_values(text)
    if message is not None:  # our own error, wrapped by Hydra
        return message
    unknown = re.search(r"Could not (?:override|append to config|delete)[^']*'([^']+)'", text)
    unreadable = [item.override for item in chain if isinstance(item, OverrideParseException)]
    wrong_type = next(
        (line for line in lines if re.search("could not be converted|is not a valid", line)), None
    )
    if wrong_type:
        key = re.search(r"full_key: (\S+)", text)
        return f"{key.group(1) if key else 'config'}: {wrong_type.rstrip('.')}."
    group = re.search(r"Could not find '([^']+)/([^/']+)'", text)
    if group:
        return _unknown_choice(group[1], group[2], chosen or [])
    if unknown:
        return _unknown_setting(unknown.group(1), text, chosen)
    if unreadable:
        return (
            f"{unreadable[0]}: must be KEY=VALUE. Put a value with blanks, commas, =, quotes or "
            "brackets in quotes, such as 'data.train=\"my file.csv\"'."
        )
    return text[:600]


def _unresolved(text: str) -> str | None:
    """Return the message for an interpolation without a value, or None."""
    match = re.search(
        r"(?:resolving interpolation: \"?|(?=Interpolation key))(.*?)\"?\n.*?full_key: (\S+)",
        text,
        re.DOTALL,
    )
    return f"{match[2]}: {match[1].rstrip('.')}." if match else None


def _several_values(text: str) -> str | None:
    """Return the message for KEY=A,B outside of a sweep, or None."""
    match = re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'", text)
    if match is None:
        return None
    key, values = match.groups()
    return (
        f"{key}={values}: must be one value. A sweep over them requires -m (lora-lightning train "
        f"-m {key}={values}), a list requires brackets ('{key}=[{values}]')."
    )


def all_keys(chosen: list[str] | None = None) -> list[str]:
    """Return every settable key, dotted, of the default config or a config with other choices."""
    config = composed(chosen or [])

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, DictConfig):
            return []
        keys = []
        for name in map(str, node):
            keys.append(f"{prefix}{name}")
            if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
                keys += walk(node[name], f"{prefix}{name}.")
        return keys

    return walk(config, "")


def _unknown_setting(name: str, text: str, chosen: list[str] | None) -> str:
    name = name.removeprefix("hydra.") if name.startswith("hydra.launcher.") else name
    if name.startswith("launcher.halving."):
        return f"{name}: must be set with the whole rule, 'launcher.halving={{eta: 2, rungs: 3}}'."
    known = all_keys(chosen)
    if name.startswith("launcher.") and name in known:  # typed as hydra.launcher.NAME
        return f"{name}: requires hydra/launcher=packed."
    if name not in known:
        return (
            f"{name}: unknown setting.{did_you_mean(name, known)} `lora-lightning train --cfg job` "
            "shows all; +KEY=VALUE adds one to trainer, logger or callbacks."
        )
    if "already at" in text:
        return f"{name}: exists already. Type it without the plus in front."
    return f"{name}: takes new entries with a plus in front, '+{name}={{NAME: VALUE}}'."


def _unknown_choice(group: str, choice: str, chosen: Sequence[str] = ()) -> str:
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return f'{group}={choice}: not installed. pip install "lora_lightning[optuna]"'
    if group == "hydra/launcher" and choice.startswith("submitit_"):
        return f'{group}={choice}: not installed. pip install "lora_lightning[slurm]"'
    known = choices(group, chosen)
    return f"{group}={choice}: not found.{did_you_mean(choice, known)} Known: {', '.join(known)}."
