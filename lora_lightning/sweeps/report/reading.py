"""Reading of a sweep's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.config.presets import CONFIG_NAME, searched
from lora_lightning.config.saved import read_config, read_overrides, read_yaml
from lora_lightning.config.schema import SWEEP
from lora_lightning.config.untrusted import settings_from_file
from lora_lightning.errors import UserError
from lora_lightning.lora.config import LoraConfig
from lora_lightning.sweeps.folder import resume_command
from lora_lightning.utils.locks import is_abandoned
from lora_lightning.utils.logs import curve, read_metrics, read_result, tell_damaged
from lora_lightning.utils.run_folder import RunFolder

from .results import Run, Sweep


def read_sweep(folder: Path) -> Sweep:
    """Read the runs directly below a folder.

    Raises:
        UserError: the folder does not exist, or holds no run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: folder not found. Give the folder of a sweep.")
    paths = sorted(folder.glob("*/.hydra/config.yaml"), key=lambda path: _natural(path.parts[-3]))
    if not paths:
        raise UserError(f"{folder}: holds no run. {_hint(folder)}")
    runs = [_read_run(path.parent.parent) for path in paths]
    if not is_abandoned(folder):
        return Sweep(folder, runs)
    for run in runs:  # a killed sweep cannot record this
        run.result["status"] = {"running": "interrupted", "waiting": "not started"}.get(
            run.status, run.status
        )
    return Sweep(folder, runs, resume_command(folder))


def _hint(folder: Path) -> str:
    """Return a hint on where to find a sweep."""
    if RunFolder(folder).config.is_file():
        return f"It is a run; give the folder of its sweep: {folder.absolute().parent}."
    sweeps = [path.parent for path in folder.glob(f"*/**/{SWEEP}")]
    if sweeps:
        newest = max(sweeps, key=lambda path: (path / SWEEP).stat().st_mtime)
        return f"There are {len(sweeps)} sweeps below it, the newest: {newest}"
    return "Give the folder of a sweep, such as multirun/<date>/<time>."


def _read_run(folder: Path) -> Run:
    run = RunFolder(folder)
    saved = run.config
    config = _without_resolvers(read_config(saved))
    lora = _lora_config(config, saved)
    overrides = read_overrides(run.overrides)
    path = run.result
    exists = path.is_file()
    result = read_result(path)
    if exists and not result:
        raise UserError(
            f"{path}: is damaged. Run the sweep's command again to resume this job, or delete the "
            "file to report the job as waiting."
        )
    metrics = run.metrics
    rows, damaged = read_metrics(metrics)
    if result.get("status") != "running":  # the last line of a running job may be incomplete
        tell_damaged(metrics, damaged)
    # The last value logged for a step counts. Earlier versions count steps from 0.
    shift = 0 if result.get("first_step") == 1 else 1
    points = {step + shift: value for step, value in curve(rows, str(config.task.monitor))}
    return Run(folder, config, overrides, result, lora, sorted(points.items()), _presets(folder))


def _presets(folder: Path) -> list[str]:
    """Return the arguments of a run's command that locate the user's own presets."""
    try:
        saved = read_yaml(RunFolder(folder).hydra_config)
        parts: Any = OmegaConf.to_container(saved, resolve=False)["hydra"]  # type: ignore[index, call-overload]
        typed = [str(item) for item in parts["overrides"]["hydra"]]
        name = parts["job"]["config_name"] or CONFIG_NAME
    except Exception:  # the file is absent, damaged, or from another version of Hydra
        return []
    primary = [] if name == CONFIG_NAME else ["--config-name", str(name)]
    return [*primary, *searched(typed)]


def _lora_config(config: DictConfig, path: Path) -> LoraConfig | None:
    """Return the adapter's settings; None for full fine-tuning.

    Raises:
        UserError: a config value that the report needs is absent or has the wrong type.
    """
    try:
        task, lora, seed = (
            OmegaConf.to_container(node, resolve=True) if isinstance(node, Container) else node
            for node in (config[key] for key in ("task", "lora", "seed"))
        )
        if not isinstance(task, dict) or not isinstance(task.get("monitor"), str):
            raise UserError(f"{path}: task.monitor must be the name of a metric.")
        if not isinstance(seed, int):
            raise UserError(f"{path}: seed must be a whole number.")
        values = settings_from_file({"lora": lora}, path)["lora"]
        return None if values.pop("method", "lora") == "full" else LoraConfig(**values)
    except UserError as error:
        named = str(path) in str(error)
        raise UserError(str(error) if named else f"{path}: {error}") from None
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}.") from None


def _without_resolvers(config: DictConfig) -> DictConfig:
    """Return a config in which `${oc.env:NAME}` and the like become plain `$ {...}`.

    References such as `${lora.rank}` stay. The folder may come from somebody else, whose resolvers
    would put values of this environment into the report.
    """

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        if isinstance(node, str) and "${" in node and ":" in node:
            return node.replace("${", "$ {")
        return node

    plain = walk(OmegaConf.to_container(config, resolve=False))
    assert isinstance(plain, dict)
    return OmegaConf.create(plain)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdigit() else (1, 0, name)
