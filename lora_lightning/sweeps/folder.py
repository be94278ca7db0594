"""The folder of a sweep: a new one, or the folder of the same sweep if it was stopped."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lora_lightning.config.schema import SWEEP
from lora_lightning.utils.atomic_write import write_json
from lora_lightning.utils.logs import read_json

from .halving import DEFAULTS

ROOT = Path("multirun")
FOLDER = "hydra.sweep.dir="


def sweep_folder(overrides: list[str]) -> list[str]:
    """Return an override for the folder of the same sweep, if its last run did not end well."""
    if any(item.lstrip("+").startswith(FOLDER) for item in overrides):
        return []
    for path in sorted(ROOT.glob(f"*/*/{SWEEP}"), reverse=True):
        content = read_json(path)
        recorded = content.get("overrides")
        if isinstance(recorded, list) and plain(map(str, recorded)) == plain(overrides):
            if content.get("status") == "completed":
                return []
            print(
                f"The sweep resumes in {path.parent}. For a new sweep: {FOLDER}DIR.",
                file=sys.stderr,
            )
            return [f"{FOLDER}{path.parent}"]
    return []


def record_sweep(
    sweep_dir: Path, overrides: list[str], status: str, *, flags: tuple[str, ...] = ()
) -> None:
    """Record which sweep a folder holds, its status, and the arguments of its command.

    Args:
        sweep_dir: Folder of the sweep.
        overrides: All overrides of the sweep, Hydra's own included.
        status: running, completed or failed.
        flags: Flags of the command, such as `--config-name`. None by default.
    """
    left_out = (FOLDER, "hydra.mode=")
    typed = [item for item in overrides if not item.lstrip("+").startswith(left_out)]
    content = {"overrides": plain(overrides), "status": status, "arguments": [*flags, *typed]}
    write_json(sweep_dir / SWEEP, content)


def resume_command(sweep_dir: Path) -> str:
    """Return the command that resumes a sweep; "" if it is complete or its command is unknown."""
    content = read_json(sweep_dir / SWEEP)
    arguments = content.get("arguments")
    if not isinstance(arguments, list) or content.get("status") == "completed":
        return ""
    words = ["lora-lightning", "train", "-m", *map(str, arguments), f"{FOLDER}{sweep_dir}"]
    return shlex.join(words)


def plain(overrides: Iterable[str]) -> list[str]:
    """Return the overrides without those on where and how the sweep runs.

    Two sweeps with the same remaining overrides are the same sweep.
    """
    how = ("hydra.sweep.", "launcher.", "hydra/launcher=", "hydra.mode=")
    kept = []
    for item in overrides:
        name = item.lstrip("+").removeprefix("hydra.") if "launcher." in item else item.lstrip("+")
        if name.startswith("launcher.halving="):
            kept.append(_spelled_out(name))
        elif not name.startswith(how):
            kept.append(item)
    return sorted(kept)


def _spelled_out(halving: str) -> str:
    """Return an override of launcher.halving with all keys of the rule, in one order."""
    try:
        value: Any = OverridesParser.create().parse_override(halving).value()
        rule = {**DEFAULTS, **value}
    except (HydraException, TypeError):  # it is reported where the rule is read
        return halving
    parts = (f"{key}: {'null' if value is None else value}" for key, value in rule.items())
    return f"launcher.halving={{{', '.join(parts)}}}"
