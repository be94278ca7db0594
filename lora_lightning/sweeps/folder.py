"""Choice of a sweep's folder: a new one, or the folder of the same sweep if it was stopped."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_lightning.config.schema import SWEEP
from lora_lightning.utils.atomic_write import write_json
from lora_lightning.utils.logs import read_json

ROOT = Path("multirun")


def sweep_folder(overrides: list[str]) -> list[str]:
    """Return an override for the folder of the same sweep, if its last run did not end well."""
    if any(item.lstrip("+").startswith("hydra.sweep.dir=") for item in overrides):
        return []
    for path in sorted(ROOT.glob(f"*/*/{SWEEP}"), reverse=True):
        found = read_json(path)
        if found.get("overrides") == plain(overrides):
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


def plain(overrides: list[str]) -> list[str]:
    """Return the overrides without those on where and how the sweep runs.

    Two sweeps with the same remaining overrides are the same sweep.
    """
    how = ("hydra.sweep.", "hydra.launcher.", "hydra/launcher=", "hydra.mode=")
    keys = {item: item.lstrip("+") for item in overrides}
    return sorted(
        item
        for item in overrides
        if keys[item].startswith("hydra.launcher.halving") or not keys[item].startswith(how)
    )
