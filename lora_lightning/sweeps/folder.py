"""Choice of a sweep's folder: a new one, or the folder of the same sweep if it was stopped."""

from __future__ import annotations

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


def sweep_folder(overrides: list[str]) -> list[str]:
    """Return an override for the folder of the same sweep, if its last run did not end well."""
    if any(item.lstrip("+").startswith("hydra.sweep.dir=") for item in overrides):
        return []
    for path in sorted(ROOT.glob(f"*/*/{SWEEP}"), reverse=True):
        found = read_json(path)
        recorded = found.get("overrides")
        if isinstance(recorded, list) and plain(map(str, recorded)) == plain(overrides):
            if found.get("status") == "completed":
                return []
            print(
                f"This sweep was begun before and goes on in {path.parent}. For a new one: "
                "hydra.sweep.dir=DIR.",
                file=sys.stderr,
            )
            return [f"hydra.sweep.dir={path.parent}"]
    return []


def note(sweep_dir: Path, overrides: list[str], status: str) -> None:
    """Record which sweep a folder holds, and its status."""
    write_json(sweep_dir / SWEEP, {"overrides": plain(overrides), "status": status})


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
