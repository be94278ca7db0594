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
    told = next((str(item) for item in chain if isinstance(item, UserError)), None)
    told = told or _unresolved(str(error)) or _several_values(text)
    if told is not None:  # our own error, wrapped by Hydra
        return told
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
        return _no_such_choice(group[1], group[2], chosen or [])
    if unknown:
        return _no_such_setting(unknown.group(1), text, chosen)
    if unreadable:
        return (
            f"cannot read {unreadable[0]!r}: give KEY=VALUE, and put a value with blanks, "
            "commas, =, quotes or brackets in quotes, for instance: 'data.train=\"my file.csv\"'."
        )
    return text[:600]


def _unresolved(text: str) -> str | None:
    """Return the message for an interpolation without a value, or None."""
    found = re.search(
        r"(?:resolving interpolation: \"?|(?=Interpolation key))(.*?)\"?\n.*?full_key: (\S+)",
        text,
        re.DOTALL,
    )
    return f"{found[2]}: {found[1].rstrip('.')}." if found else None


def _several_values(text: str) -> str | None:
    """Return the message for KEY=A,B outside of a sweep, or None."""
    found = re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'", text)
    if found is None:
        return None
    key, values = found.groups()
    return (
        f"{key}={values} is several values: a sweep over them wants -m (lora-lightning train "
        f"-m {key}={values}), a list wants brackets ('{key}=[{values}]')."
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


def _no_such_setting(name: str, text: str, chosen: list[str] | None) -> str:
    if name.startswith("hydra.launcher."):
        return _no_such_launcher_setting(name.removeprefix("hydra."))
    known = all_keys(chosen)
    if name in known:
        if "already at" in text:
            advice = "is there already: leave out the plus in front of it."
        else:
            advice = f"takes new entries with a plus in front: '+{name}={{NAME: VALUE}}'."
        return f"{name} {advice}"
    return (
        f"{name}: there is no such setting.{did_you_mean(name, known)} "
        "`lora-lightning train --cfg job` shows all; +KEY=VALUE adds one to trainer, logger "
        "or callbacks."
    )


def _no_such_launcher_setting(name: str) -> str:
    own = {
        "launcher.max_slots": "belongs to hydra/launcher=packed: add that.",
        "launcher.memory": "belongs to hydra/launcher=packed: add that.",
        "launcher.halving.eta": "is given with the rest: 'launcher.halving={eta: 2, rungs: 3}'.",
        "launcher.halving.rungs": "is given with the rest: 'launcher.halving={eta: 2, rungs: 3}'.",
        "launcher.halving.min_resource": "is given with the rest: "
        "'launcher.halving={eta: 2, rungs: 2, min_resource: 0.125}'.",
    }
    if name in own:
        return f"{name} {own[name]}"
    known = ("jobs", "gpus_per_job", "fail_fast", "halving", "max_slots", "memory")
    near = did_you_mean(name, [f"launcher.{key}" for key in known])
    return f"{name}: there is no such setting.{near} Launchers have {', '.join(known)}."


def _no_such_choice(group: str, choice: str, chosen: Sequence[str] = ()) -> str:
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return 'the Optuna sweeper is not installed: pip install "lora_lightning[optuna]".'
    if group == "hydra/launcher" and choice.startswith("submitit_"):
        return 'the submitit launcher is not installed: pip install "lora_lightning[slurm]".'
    known = choices(group, chosen)
    return (
        f"{group}={choice}: there is no such choice.{did_you_mean(choice, known)} "
        f"Known: {', '.join(known)}."
    )
