"""Jobs of a sweep as planned: composed, compared with what their folders hold, and saved there."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from lora_lightning.config.compose import config_hash
from lora_lightning.config.paths import anchor
from lora_lightning.config.saved import read_config, read_overrides
from lora_lightning.errors import UserError
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.output_folders import create_folder
from lora_lightning.utils.run_folder import RunFolder

from .curve_names import name_curves
from .job import Job

OTHER_FOLDER = "Use another folder: hydra.sweep.dir=DIR."


def plan_job(context: HydraContext, sweep: DictConfig, number: int, overrides: list[str]) -> Job:
    """Return a job with its config, and with its state if an earlier sweep has run it.

    Args:
        context: What Hydra composes with.
        sweep: Config of the sweep.
        number: Number of the job, from 0.
        overrides: Overrides of the job.

    Raises:
        UserError: the job's folder holds something else.
    """
    overrides = [item for item in overrides if not item.lstrip("+").startswith("launcher.")]
    config = context.config_loader.load_sweep_config(sweep, overrides)
    with open_dict(config):
        config.hydra.job.id = str(number)
        config.hydra.job.num = number
    sweep_dir = Path(sweep.hydra.sweep.dir).absolute()
    folder = sweep_dir / str(config.hydra.sweep.subdir)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
        config.output_dir = str(folder)
    name_curves(config, folder, _varied(sweep, overrides))
    anchor(config, Path.cwd())
    if os.path.lexists(folder):
        from lora_lightning.training.folder_checks import job_conflicts

        if lost := job_conflicts(folder):
            raise UserError(
                f"{folder}: holds files that the sweep did not write and would replace: "
                f"{', '.join(filter(None, lost)) or folder}. {OTHER_FOLDER}"
            )
    job = Job(number, list(filter_overrides(overrides)), folder, config)
    recorded = _recorded_hash(job)
    if recorded not in (None, config_hash(without_hydra(config))):
        raise UserError(
            f"{folder}: holds a job with other settings, so {sweep_dir} belongs to another sweep. "
            f"{OTHER_FOLDER} (A sampling sweeper repeats its jobs if hydra.sweeper.sampler.seed is "
            "set.)"
        )
    status = str(job.result().get("status"))
    if recorded is not None and status in ("completed", "paused", "stopped"):
        job.state = "kept" if status == "completed" else status
    return job


def _varied(sweep: DictConfig, overrides: list[str]) -> dict[str, str]:
    """Return a job's values of the varied settings, by key."""
    parser = OverridesParser.create()
    typed = parser.parse_overrides(list(sweep.hydra.overrides.task))
    fixed = {item.get_key_element() for item in typed if not item.is_sweep_override()}
    return {
        item.get_key_element().lstrip("+"): item.get_value_element_as_str()
        for item in parser.parse_overrides(list(filter_overrides(overrides)))
        if item.get_key_element() not in fixed
    }


def _recorded_hash(job: Job) -> str | None:
    """Return the hash of the config in a job's folder; None if no job has begun there.

    If a power cut has damaged config.yaml, the hash comes from result.json. A config with the same
    hash may then replace the damaged one.

    Raises:
        UserError: neither file gives the hash, and the job has trained.
    """
    try:
        return config_hash(read_config(RunFolder(job.folder).config))
    except UserError as error:
        recorded = job.result().get("config_hash")
        if recorded is None and any(RunFolder(job.folder).checkpoints.glob("*")):
            raise UserError(
                f"{error} result.json does not have the hash of its settings either. Delete "
                f"{job.folder} to train this job from the start."
            ) from None
        return None if recorded is None else str(recorded)


def is_saved(job: Job) -> bool:
    """Return whether the files that `save_job` writes can be read, as a report needs."""
    try:
        read_config(RunFolder(job.folder).config)
        read_overrides(RunFolder(job.folder).overrides)
    except UserError:
        return False
    return True


def save_job(job: Job) -> None:
    """Write .hydra/, from which the job's process and a later sweep read the job's settings.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = RunFolder(job.folder).hydra
    try:
        create_folder(folder)
        for name, content in (
            ("hydra.yaml", OmegaConf.masked_copy(job.config, "hydra")),
            ("overrides.yaml", job.config.hydra.overrides.task),
            ("config.yaml", without_hydra(job.config)),
        ):
            atomic_write(folder / name, OmegaConf.to_yaml(content))
    except OSError as error:
        raise UserError(f"hydra.sweep.dir: {folder} cannot be written: {error}.") from None


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a job's config without Hydra's part."""
    copy = config.copy()
    with open_dict(copy):
        copy.pop("hydra", None)
    return copy
