"""Composition of the configuration, with schemas for our own groups and messages about mistakes.

Only `config`, `sweeps` and `cli` import Hydra.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.lora.config import LoraConfig

from .groups import LARGEST_SEED, METHODS, Schema, Settings, composed, register_schemas
from .messages import explain
from .paths import anchor
from .presets import primary, searched
from .saved import ADDED, RENAMED, leaves
from .schema import (
    GENERATION,
    OWN_GROUPS,
    TASK_ALIASES,
    TASK_CONFIGS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    direction_of,
    refuse_direction,
)


def direction(config: DictConfig) -> str:
    """Return "max" or "min", whichever is best for a run's monitored metric.

    Raises:
        UserError: task.mode contradicts the meaning of the metric.
    """
    return direction_of(str(config.task.monitor), config.task.get("mode"))


def with_direction(config: DictConfig) -> DictConfig:
    """Return the config with an open `task.mode` set to the meaning of the metric.

    The mode of each callback that follows `task.mode`, but has its own metric, is set likewise.

    Raises:
        UserError: as in `direction`, and also for a callback.
    """
    settled, monitor, mode = config.copy(), str(config.task.monitor), direction(config)
    OmegaConf.update(settled, "task.mode", mode, force_add=True)
    for name, node in settled.callbacks.items():
        if not isinstance(node, DictConfig) or not {"monitor", "mode"} <= node.keys():
            continue
        own, setting = str(node.monitor), f"callbacks.{name}.mode"
        if not OmegaConf.is_interpolation(node, "mode"):
            direction_of(own, node.mode, setting)
            if own == monitor and node.mode not in (None, mode):
                refuse_direction(own, node.mode, setting)
        elif own != monitor:
            node.mode = direction_of(own)
    return settled


def settings_of(config: DictConfig) -> Settings:
    """Return the typed settings of a composed config, after their own checks.

    Raises:
        UserError: a value is out of range, or an interpolation cannot be resolved.
    """
    _refuse_unknown_groups(config)
    values = list(leaves(OmegaConf.to_container(config, resolve=False)))
    _refuse_unresolved(config, values)
    if not 0 <= config.seed <= LARGEST_SEED:
        raise UserError(f"seed must be from 0 to {LARGEST_SEED}, got {config.seed}.")
    missing = [key for key, value in values if value == MISSING]
    if missing:
        raise UserError(f"{', '.join(missing)} must be given: {missing[0]}=...")
    lora = _as_object(config.lora)
    method = lora.pop("method", "lora")
    if method == "full" and config.adapter:
        raise UserError(
            f"adapter={config.adapter} cannot be trained on with lora=full, which has no adapter: "
            "leave out one of the two."
        )
    if method not in METHODS:
        raise UserError(f"lora.method must be one of {', '.join(METHODS)}, got {method!r}.")
    return Settings(
        model=ModelConfig(**_as_object(config.model)),
        task=_as_object(config.task),
        data=DataConfig(**_as_object(config.data)),
        lora=LoraConfig(**lora) if method == "lora" else None,
        optim=OptimConfig(**_as_object(config.optim)),
    )


def _refuse_unresolved(config: DictConfig, leaves: list[tuple[str, Any]]) -> None:
    """Raise UserError for an interpolation without a value.

    Hydra's own interpolations, such as `${hydra:job.num}`, are skipped. They have a value only
    within a job.
    """
    for key, value in leaves:
        if isinstance(value, str) and "${" in value and "${hydra:" not in value:
            try:
                OmegaConf.select(config, key)
            except OmegaConfBaseException as error:
                raise UserError(explain(error)) from None


def _refuse_unknown_groups(config: DictConfig) -> None:
    """Raise UserError for an entry next to the groups of settings that has no effect.

    An entry that settings read by an interpolation, ${NAME}, has an effect.
    """
    known = [key.name for key in fields(Schema)]
    others = [str(key) for key in config if key not in known]
    if not others:
        return
    raw = json.dumps(OmegaConf.to_container(config, resolve=False), default=str)
    for name in others:
        if not re.search(rf"\$\{{{re.escape(name)}[.}}\[]", raw):
            raise UserError(
                f"{name}: there is no such group of settings, and nothing refers to it."
                f"{did_you_mean(name, known)} Leave it out. Groups: {', '.join(known)}."
            )


def settings_saved(saved: dict[str, Any]) -> Settings:
    """Return the typed settings that were saved with an adapter.

    Raises:
        UserError: a value has the wrong type, or is out of range.
    """
    task = TASK_CONFIGS.get(str(saved["task"].get("name")))
    if task is None:
        raise UserError(f"the adapter's saved settings name no known task: {saved['task']!r:.100}.")
    schema = OmegaConf.structured(Schema)
    schema.task = OmegaConf.structured(task)
    groups = {group: saved[group] for group in OWN_GROUPS if saved.get(group)}
    try:
        return settings_of(OmegaConf.merge(schema, groups))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise UserError(f"the adapter's saved settings do not fit: {explain(error)}") from None


def compose_config(overrides: list[str]) -> DictConfig:
    """Compose conf/train.yaml with overrides, without running anything.

    Raises:
        UserError: an override names an unknown key or choice, or has the wrong type.
    """
    try:
        config = composed(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        chosen = [override for override in overrides if re.fullmatch(r"task=\w+", override)]
        raise UserError(explain(error, [*chosen, *searched(overrides)])) from None
    anchor(config, Path.cwd())
    return config


def sweep_dir_of(overrides: list[str]) -> str:
    """Return the folder that a sweep with these overrides writes to.

    Raises:
        UserError: an override is wrong.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with primary.initialized():
            config = compose(primary.name, overrides=overrides, return_hydra_config=True)
            return str(config.hydra.sweep.dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None


def sweep_choices(overrides: list[str]) -> list[list[str]]:
    """Return overrides without sweeps that cover every choice of every sweep at least once."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        choices = [
            [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
            if item.is_discrete_sweep()
            else [str(item.input_line)]
            for item in parsed
            if item.is_discrete_sweep() or not item.is_sweep_override()
        ]
    except HydraException as error:
        raise UserError(explain(error)) from None
    longest = max(map(len, choices), default=1)
    return [[values[min(i, len(values) - 1)] for values in choices] for i in range(longest)]


def over_saved(saved: dict[str, Any], overrides: list[str]) -> DictConfig:
    """Return the config saved with an adapter, changed by this call's overrides.

    Raises:
        UserError: an override is wrong.
    """
    start = [f"task={saved['task'].get('name', 'classification')}"]
    asked = compose_config([*start, *overrides])
    default = compose_config(start)
    plain = default.copy()
    OmegaConf.set_struct(default, False)
    try:
        for group, values in saved.items():
            default[group] = OmegaConf.merge(default[group], values) if default[group] else values
    except OmegaConfBaseException as error:
        raise UserError(f"the adapter's saved settings do not fit: {explain(error)}") from None
    for override in OverridesParser.create().parse_overrides(overrides):
        key = str(override.key_or_group)
        if key.partition(".")[0] in asked:
            value = OmegaConf.select(asked, key)
            if key.removeprefix("task.") in GENERATION:
                key = key.replace("task.", "task.generation.")
            OmegaConf.update(default, key, value, merge=False)
        elif not key.startswith("hydra."):  # a preset of several groups
            before = dict(leaves(OmegaConf.to_container(plain)))
            for changed, value in leaves(OmegaConf.to_container(asked)):
                if before.get(changed) != value:
                    OmegaConf.update(default, changed, value, force_add=True)
    return default


def saved_settings(config: DictConfig) -> dict[str, Any]:
    """Return our own groups as plain values, to be saved with an adapter."""
    return {group: _as_object(config[group]) for group in OWN_GROUPS}


def config_hash(config: DictConfig) -> str:
    """Return a hash of what a run computes, without its output folder, tags and logger."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    for key in ("output_dir", "tags", "logger"):
        plain.pop(key, None)
    plain["task"] = _with_earlier_names(plain["task"])
    for group, values in ADDED.items():
        items = plain[group].items()
        plain[group] = {key: value for key, value in items if (key, value) not in values.items()}
    text = json.dumps(plain, sort_keys=True)
    for old, new in RENAMED.items():  # so that stopped sweeps and runs are found again
        text = text.replace(new, old)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_earlier_names(task: Any) -> Any:
    """Return a task's settings under the names that they had before 0.1."""
    if not isinstance(task, dict):
        return task
    earlier = {current: alias for alias, current in TASK_ALIASES.items()}
    aliases = {name: task[name] for name in GENERATION if task.get(name) is not None}
    named = {"name": earlier.get(str(task.get("name")), task.get("name"))}
    generation = task.get("generation") or {}
    rest = {name: value for name, value in task.items() if name not in (*GENERATION, "generation")}
    return {**rest, **named, **generation, **aliases}


def _as_object(node: Any) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
