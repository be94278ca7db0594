"""`train resume=DIR`: a stopped run, with the config that it saved."""

from __future__ import annotations

import os
import re
from pathlib import Path

from omegaconf import OmegaConf

from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.config.presets import search_override, searched
from lora_lightning.config.saved import (
    check_typed_again,
    damaged_config_error,
    read_run_config,
    read_yaml,
)
from lora_lightning.config.schema import SWEEP
from lora_lightning.errors import UserError
from lora_lightning.sweeps.job_process import OWN_CONFIG
from lora_lightning.utils.output_folders import expanded
from lora_lightning.utils.run_folder import RunFolder

RESUMES_WITH = (
    r"trainer=|trainer\.(accelerator|devices|num_nodes|strategy)\b|data\.num_workers="
    r"|hydra\.searchpath="
)
"""Settings that a resumed run accepts, because they do not change the result."""
TYPED_AGAIN = (
    r"\._target_=|\$\{|^model\.(trust_remote_code|attn_implementation)="
    r"|^(logger|callbacks|trainer|data\.cache_dir)\b"
)
"""Settings that a resume may have to repeat, because the saved config may be somebody else's."""


def resume_run(folder: str, settings: list[str]) -> None:
    """Resume the run in a folder.

    Args:
        folder: folder of the run, as typed.
        settings: the other settings of the command line.

    Raises:
        UserError: the folder holds no run, or a setting is not supported or missing.
    """
    run_dir = expanded(folder, "resume").resolve()
    typed = [item for item in settings if re.search(TYPED_AGAIN, item)]
    settings = [item for item in settings if item not in typed]
    _check_settings(folder, settings)
    saved = _saved_config(run_dir, folder)
    config = read_run_config(saved)
    if is_complete(run_dir):
        return
    config.output_dir = str(run_dir)
    is_job = OWN_CONFIG in os.environ  # the sweep has just written this config
    if not is_job:
        settings += check_typed_again(config, typed, f"resume={folder}")
        _check_settings(folder, settings)
    if settings:
        search = [] if searched(settings) else _saved_search(run_dir)
        asked = compose_config([*settings, *search])
        if any(item.startswith("trainer") for item in settings):
            for key in ("accelerator", "devices", "num_nodes", "strategy"):
                config.trainer[key] = asked.trainer[key]
        if any(item.startswith("data.num_workers=") for item in settings):
            config.data.num_workers = asked.data.num_workers
        if not is_job:
            check_typed_again(config, typed, f"resume={folder}")  # from a preset beside the run
    try:
        settings_of(config)
    except Exception as error:
        raise damaged_config_error(saved, error) from error
    from lora_lightning.training.run import train

    train(config, resume=True, saved=None if is_job else saved)


def _check_settings(folder: str, settings: list[str]) -> None:
    """Raise UserError for settings of a resumed run that do not say where it trains."""
    if refused := [item for item in settings if not re.match(RESUMES_WITH, item)]:
        raise UserError(
            f"resume={folder}: not supported with {' '.join(refused)}. A resumed run keeps its "
            "config; only trainer=, trainer.devices= and data.num_workers= may change."
        )


def _saved_config(run_dir: Path, folder: str) -> Path:
    """Return the file with the config of the run in a folder.

    Raises:
        UserError: the folder holds no run.
    """
    if run_dir.is_file():
        raise UserError(
            f"resume={folder}: must be the folder of a run, not a file. A new run that starts from "
            f"a checkpoint is typed as adapter={folder}."
        )
    if not run_dir.is_dir():
        raise UserError(f"resume={folder}: not found. Use the output_dir of a run that stopped.")
    if (run_dir / SWEEP).is_file():
        raise UserError(
            f"resume={folder}: must be the folder of a run, not of a sweep. Type the sweep's "
            f"command again, with hydra.sweep.dir={folder}."
        )
    saved = RunFolder(run_dir).config
    if not saved.is_file():
        raise UserError(
            f"resume={folder}: must be the folder of a run, with a .hydra/config.yaml. Use the "
            "output_dir of a run that stopped."
        )
    return saved


def _saved_search(run_dir: Path) -> list[str]:
    """Return the override for the run's preset folders, without missing folders and packages."""
    try:
        entries = OmegaConf.select(read_yaml(RunFolder(run_dir).hydra_config), "hydra.searchpath")
    except UserError:
        entries = None
    folders = [entry for entry in entries or [] if str(entry).startswith("file://")]
    existing = [entry for entry in folders if Path(entry.removeprefix("file://")).is_dir()]
    return [search_override(existing)] if existing else []


def is_complete(run_dir: Path) -> bool:
    """Return whether the folder's run is complete, and print that if so."""
    complete = RunFolder(run_dir).completed_result() is not None
    if complete:
        print(f"{run_dir} is complete: nothing to resume.")
    return complete
