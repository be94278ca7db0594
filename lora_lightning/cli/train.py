"""The verb `train`: one run, a sweep, a resumed run, or one of Hydra's own outputs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lora_lightning.config.compose import (
    compose_config,
    compose_hydra,
    direction,
    settings_of,
    sweep_choices,
)
from lora_lightning.config.paths import check_data_files
from lora_lightning.config.schema import RESUME_AUTO, LauncherConfig
from lora_lightning.distributed import environment as cluster
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.run_folder import RunFolder

from .hydra_run import run_hydra
from .resume import is_complete, resume_run

MULTIRUN_FLAGS = ("-m", "--multirun")
HYDRA_FLAGS = (
    *MULTIRUN_FLAGS,
    *("-h", "--help", "--hydra-help", "-c", "--cfg", "--resolve", "-p", "--package"),
    *("-i", "--info"),
)
PRESET_FLAGS = ("--config-dir", "--config-path", "--config-name")
"""Hydra flags that `with_presets` has removed."""
LAUNCHED_FROM_OUTSIDE = {
    "torchrun": ("torchrun", "TORCHELASTIC_RUN_ID"),
    "slurm": ("srun", "SLURM_NTASKS"),
}
"""Presets of `trainer` for processes that another program starts, with that program and a variable
that it sets."""
PACKED_ONLY = ("max_slots", "memory")
"""Settings of `launcher` that only the packed launcher has."""


def start(arguments: list[str]) -> None:
    """Run the verb `train`.

    Args:
        arguments: overrides, and flags of Hydra without those for presets.

    Raises:
        UserError: the arguments are wrong.
    """
    # Lightning's rank 0 starts the other ranks with this command line and their rank.
    is_child = cluster.started_by_rank_zero()
    if is_child:
        cluster.end_with_starter()
    if (folder := _folder_to_resume(arguments)) is not None:
        resume_run(folder, [item for item in arguments if item != f"resume={folder}"])
        return
    flags = [item for item in arguments if item.startswith("-")]
    overrides = [item for item in arguments if not item.startswith("-")]
    is_sweep = _check_flags(flags, overrides)
    if not is_sweep and (is_child or flags):
        run_hydra(arguments)
    elif is_sweep:
        _start_sweep(overrides)
    else:
        _start_run(overrides)


def _folder_to_resume(arguments: list[str]) -> str | None:
    """Return DIR of a typed resume=DIR, which replaces all other settings of a run."""
    typed = [item.removeprefix("resume=") for item in arguments if item.startswith("resume=")]
    return next((value for value in typed if value not in (RESUME_AUTO, "null")), None)


def _check_flags(flags: list[str], overrides: list[str]) -> bool:
    """Return whether a sweep is requested.

    Raises:
        UserError: a flag is unknown, or cannot be used here.
    """
    for flag in flags:
        if flag.partition("=")[0] not in HYDRA_FLAGS:
            near = did_you_mean(flag, HYDRA_FLAGS + PRESET_FLAGS)
            raise UserError(
                f"{flag}: unknown flag.{near} Settings are typed without dashes: KEY=VALUE. "
                "`lora-lightning --help` shows both."
            )
    others = [flag for flag in flags if flag not in MULTIRUN_FLAGS]
    is_sweep = bool(flags) and not others
    if others and len(others) < len(flags):
        raise UserError(f"-m is not supported with {' '.join(others)}: remove one of the two.")
    presets = [item for item in overrides if re.match(r"\+?sweep=(?!null$)", item)]
    if presets and not flags:
        print(
            f"{presets[0]} without -m: this is one run, not a sweep. For the sweep add -m.",
            file=sys.stderr,
        )
    if is_sweep and cluster.one_of_many():
        raise UserError(
            "-m is not supported with torchrun or srun, because a sweep starts the processes of "
            "its jobs itself. Run the command once, and set trainer.devices for each job."
        )
    return is_sweep


# One run --------------------------------------------------------------------------------------


def _start_run(overrides: list[str]) -> None:
    """Run once, in this process and those that Lightning, torchrun or srun start beside it."""
    _check_one_run(overrides)
    config = _check_configs([overrides])
    _check_resume(config, overrides)
    resumes = config.resume == RESUME_AUTO
    from_outside = cluster.from_outside()
    if from_outside and not _typed(overrides, "output_dir"):
        config.output_dir = cluster.common_folder(lambda: str(config.output_dir))
        resumes = True  # existing files are from this job, before its restart
    run_dir = Path(config.output_dir)
    overrides = [item for item in overrides if not item.startswith("resume=")]
    overrides.append(f"output_dir={_quoted(run_dir)}")
    if cluster.rank() > 0:  # rank 0 checks that a checkpoint there is this run's
        if not is_complete(run_dir):
            run_hydra([*overrides, "hydra.output_subdir=null"], resume=True)
        return
    resumes |= from_outside and cluster.started_again()
    from lora_lightning.training.folder_checks import check_same_run, check_unused_folder, holds_run

    exists = resumes and holds_run(run_dir)
    if exists:
        check_same_run(run_dir, config)
        if is_complete(run_dir):
            return
    with RunFolder(run_dir).rollback_on_mistake():
        if not exists:
            check_unused_folder(run_dir)
        run_hydra(overrides, resume=resumes)


def _check_one_run(overrides: list[str]) -> None:
    """Raise UserError for settings that one run, started like this, does not have."""
    _check_run_dir(overrides)
    for item in overrides:
        if re.match(r"\+*(hydra\.)?launcher\.", item):
            name = item.lstrip("+").removeprefix("hydra.")
            raise UserError(f"{name}: requires a sweep. Add -m.")
    for name, (program, variable) in LAUNCHED_FROM_OUTSIDE.items():
        if f"trainer={name}" in overrides and variable not in os.environ:
            raise UserError(
                f"trainer={name}: requires processes that {program} has started. On this machine "
                "alone use trainer=ddp trainer.devices=N."
            )


def _check_resume(config: DictConfig, overrides: list[str]) -> None:
    """Raise UserError if the config resumes from a place that it cannot name."""
    if config.resume is None:
        return
    if config.resume != RESUME_AUTO:
        raise UserError(
            f"resume={config.resume}: must be typed on the command line, because the run's own "
            f"config replaces this one. In a preset only resume={RESUME_AUTO} is supported."
        )
    if not _typed(overrides, "output_dir") and not cluster.from_outside():
        raise UserError(
            f"resume={RESUME_AUTO}: requires output_dir=DIR, because each command without it has a "
            "folder of its own."
        )


def _quoted(value: object) -> str:
    """Quote a value for Hydra's grammar, where a backslash is literal except before a quote."""
    doubled = re.sub(
        r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), str(value)
    )
    return f"'{doubled}'"


# A sweep --------------------------------------------------------------------------------------


def _start_sweep(overrides: list[str]) -> None:
    """Check every choice of a sweep, then hand it over to Hydra and its launcher."""
    _check_run_dir(overrides)
    overrides = _sweep_into_output_dir(overrides)
    choices = sweep_choices(overrides)
    config = _check_configs(choices)
    if config.resume is not None:
        raise UserError(
            f"resume={config.resume}: not supported with -m. The same command resumes a sweep."
        )
    from lora_lightning.sweeps.folder import sweep_folder

    overrides += sweep_folder(overrides)
    folder = [item for item in overrides if item.lstrip("+").startswith("hydra.sweep.dir=")]
    hydra = compose_hydra([*choices[-1], *folder])
    _check_launcher(hydra, overrides)
    sweep_dir = Path(str(hydra.hydra.sweep.dir))
    if os.path.lexists(sweep_dir) and not sweep_dir.is_dir():
        raise UserError(f"hydra.sweep.dir={sweep_dir}: must be a folder.")
    if sweep_dir.is_dir() and any(sweep_dir.iterdir()):
        from lora_lightning.training.folder_checks import check_sweep_folder

        check_sweep_folder(sweep_dir)
    run_hydra(["-m", *overrides])  # Hydra's parser wants flags before overrides


def _sweep_into_output_dir(overrides: list[str]) -> list[str]:
    """Use output_dir as the sweep's folder, because each job has its own output_dir below it.

    Raises:
        UserError: output_dir and hydra.sweep.dir are both given.
    """
    named = [item for item in overrides if re.match(r"\+*output_dir=", item)]
    if not named:
        return overrides
    if typed := [item for item in overrides if re.match(r"\+*hydra\.sweep\.dir=", item)]:
        raise UserError(
            f"{named[0]}: not supported with {typed[0]}, because both name the sweep's folder. "
            f"Remove {named[0]}."
        )
    folder = named[-1].partition("=")[2]
    return [*(item for item in overrides if item not in named), f"hydra.sweep.dir={folder}"]


def _check_launcher(config: DictConfig, overrides: list[str]) -> None:
    """Raise UserError for settings of `launcher` that vary, or that the chosen one does not have.

    Args:
        config: config of a job, with Hydra's part.
        overrides: overrides of the sweep.
    """
    for item in OverridesParser.create().parse_overrides(overrides):
        key = item.get_key_element()
        if re.match(r"\+*(hydra\.)?launcher\.", key) and item.is_sweep_override():
            raise UserError(f"{item.input_line}: a sweep cannot vary its own launcher.")
    chosen = config.hydra.runtime.choices["hydra/launcher"]
    for name, default in vars(LauncherConfig()).items():
        value = config.launcher[name]
        if value == default or chosen == "packed":
            continue
        if name in PACKED_ONLY:
            raise UserError(f"launcher.{name}={value}: requires hydra/launcher=packed.")
        if chosen != "process":
            raise UserError(
                f"launcher.{name}={value}: requires hydra/launcher=process or packed, not {chosen}."
            )


# Both -----------------------------------------------------------------------------------------


def _check_run_dir(overrides: list[str]) -> None:
    if any(item.startswith("hydra.run.dir=") for item in overrides):
        raise UserError("hydra.run.dir: not supported. Use output_dir=DIR.")


def _check_configs(choices: list[list[str]]) -> DictConfig:
    """Compose and check configs before Hydra makes a folder, and return the last one."""
    for overrides in choices:
        config = compose_config(overrides)
        settings_of(config)
        direction(config)
        check_data_files(config)
    return config


def _typed(overrides: list[str], key: str) -> bool:
    return any(item.lstrip("+").startswith(f"{key}=") for item in overrides)
