"""The hand-over of a run or a sweep to Hydra."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core import utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.config.groups import register_schemas
from lora_lightning.config.messages import explain
from lora_lightning.config.paths import anchor
from lora_lightning.config.presets import primary
from lora_lightning.config.schema import RESUME_AUTO
from lora_lightning.errors import FULL_ERROR, UserError
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.output_folders import create_folder
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import say


def run_hydra(arguments: list[str], *, resume: bool = False) -> None:
    """Hand over to Hydra, which makes the run's folder and calls back with the config.

    Args:
        arguments: flags and overrides.
        resume: whether to resume the run in the folder, if there is one (default: as the config's
            `resume` says).
    """
    from lora_lightning.sweeps import register
    from lora_lightning.sweeps.launcher import SweepError

    register_schemas()
    register()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # from Optuna; it lists its plugins
    command_line, base = list(sys.argv), Path.cwd()
    composed = False
    mistakes: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=primary.source, config_name=primary.name)
    def task(config: Any) -> float | None:
        nonlocal composed
        composed = True
        sys.argv = command_line  # Lightning starts the other ranks with it
        anchor(config, base)
        config.output_dir = os.path.abspath(HydraConfig.get().runtime.output_dir)
        is_job = HydraConfig.get().mode == RunMode.MULTIRUN
        from lora_lightning.training.run import train

        try:
            with environment(FULL_ERROR, full_error):
                if is_job:
                    result = _run_job(config)
                else:
                    result = train(config, resume=resume or config.get("resume") == RESUME_AUTO)
        except UserError as error:
            if is_job:
                raise  # another launcher runs the other jobs first, then names this one
            mistakes.append(error)
            return None
        objective = result["objective"]
        return None if objective is None else float(objective)

    sys.argv = [command_line[0], *arguments]
    full_error = os.environ.get(FULL_ERROR)
    try:
        # With full errors, Hydra raises instead of printing and exiting.
        with _atomic_configs(base), environment(FULL_ERROR, "1"):
            task()
    except (HydraException, OmegaConfBaseException) as error:
        if composed:
            raise
        raise UserError(explain(error)) from None
    except SweepError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        sys.argv = command_line
    if mistakes:
        raise mistakes[0]


def _run_job(config: Any) -> dict[str, Any]:
    """Run a job of a sweep for a launcher that is not ours, and resume it if it had begun."""
    from lora_lightning.training.folder_checks import check_same_run
    from lora_lightning.training.run import train

    run_dir = Path(config.output_dir)
    check_same_run(run_dir, config)
    return RunFolder(run_dir).completed_result() or train(config, resume=True)


@contextmanager
def _atomic_configs(base: Path) -> Iterator[None]:
    """Make Hydra write each file of .hydra/ completely or not at all within the block.

    Hydra 1.3 writes them in place, through links too. A kill would leave a run that cannot be
    resumed.

    Args:
        base: folder that relative paths of the config start from.
    """

    def save(cfg: DictConfig, filename: str, output_dir: Path) -> None:
        path = output_dir / filename
        if filename == "config.yaml":
            anchor(cfg, base)
            if path.exists():  # config.yaml is the first file that Hydra writes
                _check_is_a_runs(path)
        try:
            create_folder(output_dir)
            atomic_write(path, OmegaConf.to_yaml(cfg))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}.") from None

    original = utils._save_config
    utils._save_config = save
    try:
        yield
    finally:
        utils._save_config = original


def _check_is_a_runs(saved: Path) -> None:
    """Raise UserError for a saved config that does not belong to a run."""
    from lora_lightning.training.folder_checks import holds_run

    if not holds_run(saved.parent.parent):
        raise UserError(
            f"{saved} belongs to another program, or is damaged. Use another output_dir, or "
            "delete the file."
        )


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable within the block; None unsets it."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
