"""The verb `train`: flags, folders, and the hand-over of a run or a sweep to Hydra."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_lightning.config.compose import (
    compose_config,
    direction,
    settings_of,
    sweep_choices,
    sweep_dir_of,
)
from lora_lightning.config.groups import register_schemas
from lora_lightning.config.messages import explain
from lora_lightning.config.paths import anchor, refuse_absent
from lora_lightning.config.presets import (
    primary,
    search_override,
    searched,
    with_presets,
)
from lora_lightning.config.saved import (
    not_a_runs,
    read_run_config,
    read_yaml,
    refuse_untyped,
)
from lora_lightning.config.schema import SWEEP
from lora_lightning.distributed import environment as cluster
from lora_lightning.errors import FULL_ERROR, UserError, did_you_mean
from lora_lightning.sweeps.queue import OWN_CONFIG
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.output_folders import expanded, made_folder
from lora_lightning.utils.terminal import say

MULTIRUN_FLAGS = ("-m", "--multirun")
HYDRA_FLAGS = (
    *MULTIRUN_FLAGS,
    *("-h", "--help", "--hydra-help", "-c", "--cfg", "--resolve", "-p", "--package"),
    *("-i", "--info"),
)
OF_PRESETS = ("--config-dir", "--config-path", "--config-name")
"""Hydra flags that `with_presets` has removed."""
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
AUTO = "resume=auto"
"""Resume the run in output_dir if there is one, else begin it."""


def start(arguments: list[str]) -> None:
    """Run the verb `train`: a run, a sweep, a resumed run, or one of Hydra's own outputs.

    Raises:
        UserError: the arguments are wrong.
    """
    arguments = with_presets(arguments)
    goes_on = AUTO in arguments
    arguments = [argument for argument in arguments if argument != AUTO]
    resume = [argument for argument in arguments if argument.startswith("resume=")]
    # Lightning's rank 0 starts the other ranks with this command line and their rank.
    child = cluster.started_by_rank_zero()
    if child:
        cluster.end_with_starter()
    if resume:
        _resume(resume[0].removeprefix("resume="), [a for a in arguments if a != resume[0]])
        return
    flags = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    overrides = [re.sub(r"^(\+*)launcher\.", r"\1hydra.launcher.", item) for item in overrides]
    overrides = [_whole_halving(item) for item in overrides]
    sweeps = _look_at_flags(flags, overrides)
    if not child and not set(flags).difference(MULTIRUN_FLAGS):
        _refuse_misplaced(overrides, sweeps=sweeps, goes_on=goes_on)
    if not sweeps and (child or flags):
        run_hydra(arguments, resume=goes_on)
        return
    if any(override.startswith("hydra.run.dir=") for override in overrides):
        raise UserError("the run's folder is set by output_dir=DIR: leave out hydra.run.dir.")
    if sweeps:
        overrides = _sweep_into_output_dir(overrides)
    # Everything is composed before Hydra makes a folder, so that mistakes leave none behind.
    for choice in sweep_choices(overrides) if sweeps else [overrides]:
        config = compose_config(choice)
        settings_of(config)
        direction(config)
        refuse_absent(config)
    if sweeps:
        from lora_lightning.sweeps.folder import sweep_folder

        overrides += sweep_folder(overrides)
        place = Path(sweep_dir_of([*choice, *_hydras(overrides)]))
        if os.path.lexists(place) and not place.is_dir():
            raise UserError(f"hydra.sweep.dir={place} is no folder: give another.")
        if place.is_dir() and any(place.iterdir()):
            from lora_lightning.training.run_folder import check_sweep_folder

            check_sweep_folder(place)
        run_hydra(["-m", *overrides])  # Hydra's parser wants flags before overrides
    else:
        _run(overrides, config, goes_on=goes_on)


def _hydras(overrides: list[str]) -> list[str]:
    """Return the overrides of a sweep's folder, which are not part of a choice in the sweep."""
    return [item for item in overrides if item.lstrip("+").startswith("hydra.sweep.dir=")]


def _refuse_misplaced(overrides: list[str], *, sweeps: bool, goes_on: bool) -> None:
    """Raise UserError for settings that have no meaning where they are given."""
    if goes_on:
        named = any(item.lstrip("+").startswith("output_dir=") for item in overrides)
        if sweeps:
            raise UserError("a sweep goes on by the same command: leave out resume=auto.")
        if not (named or cluster.from_outside()):
            raise UserError(
                f"{AUTO} goes on with the run in output_dir, and without output_dir=DIR each "
                "command has a folder of its own: give it."
            )
    if sweeps:
        return
    for item in overrides:
        if item.lstrip("+").startswith("hydra.launcher."):
            raise UserError(
                f"{item.lstrip('+').removeprefix('hydra.')} is for the jobs of a sweep: add -m."
            )
    for name, starter, sign in (
        ("torchrun", "torchrun", "TORCHELASTIC_RUN_ID"),
        ("slurm", "srun", "SLURM_NTASKS"),
    ):
        if f"trainer={name}" in overrides and sign not in os.environ:
            raise UserError(
                f"trainer={name} is for processes that {starter} has started, and it has not "
                "started this one. On this machine alone: trainer=ddp, with trainer.devices=N."
            )


def _sweep_into_output_dir(overrides: list[str]) -> list[str]:
    """Use output_dir as the sweep's folder, because each job has its own output_dir below it.

    Raises:
        UserError: output_dir and hydra.sweep.dir are both given.
    """
    named = [item for item in overrides if re.match(r"\+*output_dir=", item)]
    if not named:
        return overrides
    own = [item for item in overrides if re.match(r"\+*hydra\.sweep\.dir=", item)]
    if own:
        raise UserError(
            f"{named[0]} and {own[0]} both name the folder of the sweep: leave out the former."
        )
    folder = named[-1].partition("=")[2]
    return [*(item for item in overrides if item not in named), f"hydra.sweep.dir={folder}"]


def _whole_halving(override: str) -> str:
    """Add defaults to partly given halving settings, so that a preset's settings do not apply."""
    key, equals, value = override.partition("=")
    if key.lstrip("+") != "hydra.launcher.halving" or not value.startswith("{"):
        return override
    from lora_lightning.sweeps.halving import DEFAULTS

    given = re.findall(r"(\w+)\s*:", value)
    rest = [f"{k}: {'null' if v is None else v}" for k, v in DEFAULTS.items() if k not in given]
    body = value.strip()[1:-1].strip()
    return f"{key}{equals}{{{', '.join([*([body] if body else []), *rest])}}}"


def _look_at_flags(flags: list[str], overrides: list[str]) -> bool:
    """Return whether a sweep is requested.

    Raises:
        UserError: a flag is unknown, or out of place.
    """
    for flag in flags:
        _known_flag(flag)
    sweeps = bool(flags) and not set(flags) - set(MULTIRUN_FLAGS)
    if set(flags) & set(MULTIRUN_FLAGS) and not sweeps:
        others = " ".join(flag for flag in flags if flag not in MULTIRUN_FLAGS)
        raise UserError(f"-m does not go together with {others}: leave out one of them.")
    asked = [item for item in overrides if re.match(r"\+?sweep=(?!null$)", item)]
    if asked and not flags:
        print(
            f"{asked[0]} without -m: this is one run, not a sweep. For the sweep add -m.",
            file=sys.stderr,
        )
    if sweeps and cluster.one_of_many():
        raise UserError(
            "a sweep starts the processes of its jobs itself: run it once, without torchrun or "
            "srun, and give each job its devices with trainer.devices."
        )
    return sweeps


def _run(overrides: list[str], config: DictConfig, *, goes_on: bool) -> None:
    """Run once, in this process and those that Lightning, torchrun or srun start beside it."""
    outside = cluster.from_outside()
    if outside and not any(override.startswith("output_dir=") for override in overrides):
        config.output_dir = cluster.common_folder(lambda: str(config.output_dir))
        goes_on = True  # existing files are from this job, before its restart
    run_dir = Path(config.output_dir)
    overrides = [*overrides, f"output_dir={_quoted(run_dir)}"]
    if cluster.rank() > 0:  # rank 0 checks that a checkpoint there is this run's
        if not _is_complete(run_dir):
            run_hydra([*overrides, "hydra.output_subdir=null"], resume=True)
        return
    goes_on |= outside and cluster.started_again()
    from lora_lightning.adapters.run_entries import rollback_on_mistake
    from lora_lightning.training.run_folder import check_same_run, check_unused_folder, holds_run

    is_there = goes_on and holds_run(run_dir)
    if is_there:
        check_same_run(run_dir, config)
        if _is_complete(run_dir):
            return
    with rollback_on_mistake(run_dir):
        if not is_there:
            check_unused_folder(run_dir)
        run_hydra(overrides, resume=goes_on)


def _known_flag(flag: str) -> None:
    if flag.partition("=")[0] not in HYDRA_FLAGS:
        near = did_you_mean(flag, HYDRA_FLAGS + OF_PRESETS)
        raise UserError(
            f"there is no flag {flag}.{near} Settings have no dashes: KEY=VALUE. "
            "`lora-lightning --help` shows both."
        )


def _quoted(value: object) -> str:
    """Quote a value for Hydra's grammar, where a backslash is literal except before a quote."""
    doubled = re.sub(
        r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(value)
    )
    return f"'{doubled}'"


def run_hydra(arguments: list[str], *, resume: bool = False) -> None:
    """Hand over to Hydra, which makes the run's folder and calls back with the config.

    Args:
        arguments: flags and overrides.
        resume: whether to resume the run in the folder, if there is one.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    from lora_lightning.sweeps import register
    from lora_lightning.sweeps.launcher import SweepError

    register_schemas()
    register()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # from Optuna; it lists its plugins
    whole, base = list(sys.argv), Path.cwd()
    composed = False
    mistakes: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=primary.source, config_name=primary.name)
    def task(config: Any) -> float | None:
        nonlocal composed
        composed = True
        sys.argv = whole  # Lightning starts the other ranks with this command line
        anchor(config, base)
        config.output_dir = os.path.abspath(HydraConfig.get().runtime.output_dir)
        sweeps = HydraConfig.get().mode == RunMode.MULTIRUN
        from lora_lightning.training.run import train

        try:
            with environment(FULL_ERROR, full_error):
                result = _job(config) if sweeps else train(config, resume=resume)
        except UserError as error:
            if sweeps:
                raise  # another launcher runs the other jobs first, then names this one
            mistakes.append(error)
            return None
        objective = result["objective"]
        return None if objective is None else float(objective)

    sys.argv = [whole[0], *arguments]
    full_error = os.environ.get(FULL_ERROR)
    try:
        # With full errors, Hydra raises instead of printing and exiting.
        with _whole_configs(base), environment(FULL_ERROR, "1"):
            task()
    except (HydraException, OmegaConfBaseException) as error:
        if composed:
            raise
        raise UserError(explain(error)) from None
    except SweepError as error:
        say(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        sys.argv = whole
    if mistakes:
        raise mistakes[0]


@contextmanager
def _whole_configs(base: Path) -> Iterator[None]:
    """Make Hydra write the files of .hydra/ whole or not at all within the block.

    Hydra 1.3 writes them in place, through links too. A kill would leave a run that cannot be
    resumed.

    Args:
        base: folder that relative paths of the config start from.
    """
    from hydra.core import utils

    def save(cfg: DictConfig, filename: str, output_dir: Path) -> None:
        path = output_dir / filename
        if filename == "config.yaml":
            anchor(cfg, base)
            if path.exists():  # config.yaml is the first file that Hydra writes
                _refuse_foreign(path)
        try:
            made_folder(output_dir)
            atomic_write(path, OmegaConf.to_yaml(cfg))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}.") from None

    usual = utils._save_config
    utils._save_config = save
    try:
        yield
    finally:
        utils._save_config = usual


def _refuse_foreign(saved: Path) -> None:
    """Raise UserError for a saved config that does not belong to a run."""
    from lora_lightning.training.run_folder import holds_run

    if not holds_run(saved.parent.parent):
        raise UserError(
            f"{saved} is of another program, or damaged. Give another output_dir, or delete it."
        )


def _job(config: Any) -> dict[str, Any]:
    """Run a job of a sweep for a launcher that is not ours, and resume it if it had begun."""
    from lora_lightning.training.run import train
    from lora_lightning.training.run_folder import check_same_run, completed_result

    run_dir = Path(config.output_dir)
    check_same_run(run_dir, config)
    return completed_result(run_dir) or train(config, resume=True)


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


def _resume(folder: str, others: list[str]) -> None:
    run_dir = expanded(folder, "resume").resolve()
    typed = [other for other in others if re.search(TYPED_AGAIN, other)]
    others = [other for other in others if other not in typed]
    _refuse_settings(folder, others)
    if run_dir.is_file():
        raise UserError(
            f"resume={folder} is a file: give the folder of the run, which knows its last "
            "checkpoint. From what a checkpoint had learned a new run starts with adapter=."
        )
    if not run_dir.is_dir():
        raise UserError(
            f"resume={folder}: there is no such folder. Give the output_dir of a run that stopped."
        )
    if (run_dir / SWEEP).is_file():
        raise UserError(
            f"resume={folder} is the folder of a sweep, which goes on by its own command: type it "
            f"again, with hydra.sweep.dir={folder}."
        )
    saved = run_dir / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise UserError(
            f"resume={folder} is not the folder of a run: it holds no .hydra/config.yaml. Give the "
            "output_dir of a run that stopped."
        )
    config = read_run_config(saved)
    from lora_lightning.training.run import train

    if _is_complete(run_dir):
        return
    config.output_dir = str(run_dir)
    if OWN_CONFIG not in os.environ:
        others += refuse_untyped(config, typed, f"resume={folder}")
        _refuse_settings(folder, others)
    if others:
        asked = compose_config(others if searched(others) else [*others, *_saved_search(run_dir)])
        if any(other.startswith("trainer") for other in others):
            for key in ("accelerator", "devices", "num_nodes", "strategy"):
                config.trainer[key] = asked.trainer[key]
        if any(other.startswith("data.num_workers=") for other in others):
            config.data.num_workers = asked.data.num_workers
        if OWN_CONFIG not in os.environ:
            refuse_untyped(config, typed, f"resume={folder}")  # from a preset beside the run
    try:
        settings_of(config)
    except Exception as error:
        raise not_a_runs(saved, error) from error
    train(config, resume=True, saved=None if OWN_CONFIG in os.environ else saved)


def _saved_search(run_dir: Path) -> list[str]:
    """Return the override for the run's preset folders, without missing folders and packages."""
    try:
        entries = OmegaConf.select(read_yaml(run_dir / ".hydra" / "hydra.yaml"), "hydra.searchpath")
    except UserError:
        entries = None
    folders = [entry for entry in entries or [] if str(entry).startswith("file://")]
    there = [entry for entry in folders if Path(entry.removeprefix("file://")).is_dir()]
    return [search_override(there)] if there else []


def _refuse_settings(folder: str, others: list[str]) -> None:
    """Raise UserError for settings of a resumed run that do not say where it trains."""
    refused = [other for other in others if not re.match(RESUMES_WITH, other)]
    if refused:
        raise UserError(
            f"resume={folder} goes on with the run's own config and takes no other settings than "
            "where it trains (trainer=, trainer.devices=, data.num_workers=): leave out "
            f"{' '.join(refused)}."
        )


def _is_complete(run_dir: Path) -> bool:
    """Return whether the folder's run is complete, and print that if so."""
    from lora_lightning.training.run_folder import completed_result

    complete = completed_result(run_dir) is not None
    if complete:
        print(f"{run_dir} is complete: nothing to resume.")
    return complete
