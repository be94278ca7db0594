"""The configuration: schemas for our own groups, composition, and messages about mistakes.

Only this file, `cli` and `launch` know Hydra.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lightning.errors import UserError, causes, did_you_mean
from lora_lightning.lora.config import LoraConfig

from .paths import anchor
from .presets import choices, primary, searched
from .schema import (
    OWN_GROUPS,
    TASK_CONFIGS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    direction_of,
    refuse_direction,
)
from .untrusted import is_installed_attention

METHODS = ("lora", "full")
LARGEST_SEED = 2**32 - 1
"""numpy takes no larger one."""
KNOWN_TARGETS = re.compile(
    r"lightning\.(pytorch|fabric)\.(callbacks|loggers|strategies|plugins|profilers|accelerators)\."
    r"|lora_lightning\.(callbacks|strategies|training\.callbacks|distributed)\."
    r"|torch\.optim\.|transformers\.(optimization\.|get_scheduler$)"
)
"""Where the classes are that a saved config may build without being typed again."""
RENAMED = {
    "lora_lightning.retention.Retention": "lora_lightning.callbacks.Retention",
    "lora_lightning.zero.ZeroStrategy": "lora_lightning.strategies.ZeroStrategy",
}
"""Classes that configs of runs before 0.1 name otherwise."""


@dataclass
class LoraSchema(LoraConfig):
    """The group `lora`: the adapter's settings, and whether there is one at all."""

    method: str = "lora"
    """"lora", or "full": fine-tune the whole model, the baseline (lora=full)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise UserError(f"lora.method must be one of {METHODS}, got {self.method!r}.")


@dataclass
class Schema:
    """Everything a run is made of. Our own groups are typed; Lightning's are free."""

    # Missing, not the class's default: `name_or_path: ???` in a file would not undo that.
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name_or_path=MISSING))
    task: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraSchema = field(default_factory=LoraSchema)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Seed of the initialisation, the order of batches and dropout."""
    output_dir: str = ""
    """The run's folder."""
    test_before: bool = True
    """Also test the model before training, to show what training gained."""
    adapter: str | None = None
    """Adapter folder to start training from."""
    tags: list[str] = field(default_factory=list)
    """Free words kept with the run."""


@dataclass
class Settings:
    """Our own groups as the objects that the package works with."""

    model: ModelConfig
    task: dict[str, Any]
    data: DataConfig
    lora: LoraConfig | None
    optim: OptimConfig


def register_schemas() -> None:
    """Makes the schemas known to Hydra under the names that conf/ refers to."""
    store = ConfigStore.instance()
    store.store(name="base_schema", node=Schema)
    for name, schema in TASK_CONFIGS.items():
        store.store(group="task", name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("direction", direction_of, replace=True)  # of sweep=optuna


def direction(config: DictConfig) -> str:
    """Whether "max" or "min" of a run's monitored metric is the best.

    Raises:
        UserError: task.mode is the contrary of what the metric means.
    """
    return direction_of(str(config.task.monitor), config.task.get("mode"))


def with_direction(config: DictConfig) -> DictConfig:
    """The config with `task.mode` settled, where it is left to what the metric means.

    So is the mode of each callback that follows it, and has a metric of its own.

    Raises:
        UserError: as `direction`, of a callback too.
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
    """The typed settings of a composed config; their own checks run here.

    Raises:
        UserError: a value is out of range, or an interpolation cannot be resolved.
    """
    _refuse_unknown_groups(config)
    leaves = list(_leaves(OmegaConf.to_container(config, resolve=False)))
    _refuse_unresolved(config, leaves)
    if not 0 <= config.seed <= LARGEST_SEED:
        raise UserError(f"seed must be from 0 to {LARGEST_SEED}, got {config.seed}.")
    missing = [key for key, value in leaves if value == MISSING]
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
    """Raises UserError for an interpolation without a value.

    Hydra's own, such as `${hydra:job.num}`, are left out: they have one within a job alone.
    """
    for key, value in leaves:
        if isinstance(value, str) and "${" in value and "${hydra:" not in value:
            try:
                OmegaConf.select(config, key)
            except OmegaConfBaseException as error:
                raise UserError(explain(error)) from None


def _refuse_unknown_groups(config: DictConfig) -> None:
    """Raises UserError for what stands beside the groups of settings and does nothing.

    A value that settings take by an interpolation, ${NAME}, does something.
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
    """The typed settings that were saved with an adapter.

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
    """Composes conf/train.yaml with overrides, without running anything.

    Raises:
        UserError: an override names an unknown key or choice, or has the wrong type.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    try:
        with primary.initialized():
            config = compose(primary.name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        chosen = [override for override in overrides if re.fullmatch(r"task=\w+", override)]
        raise UserError(explain(error, [*chosen, *searched(overrides)])) from None
    anchor(config, Path.cwd())
    return config


def sweep_dir_of(overrides: list[str]) -> str:
    """The folder that a sweep with these overrides writes to.

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
    """Overrides without sweeps in which every choice of every sweep comes up at least once."""
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


def explain(error: Exception, chosen: list[str] | None = None) -> str:
    """A Hydra error as one short message that names the nearest right key.

    Args:
        error: what Hydra or OmegaConf raised.
        chosen: overrides that decide which keys and presets there are, such as task=lm.
    """
    chain = causes(error)
    lines = [line.strip() for item in chain for line in str(item).splitlines() if line.strip()]
    text = " ".join(dict.fromkeys(lines))
    told = next((str(item) for item in chain if isinstance(item, UserError)), None)
    told = told or _unresolved(str(error)) or _several_values(text)
    if told is not None:  # our own, in Hydra's wrapping
        return told
    unknown = re.search(r"Could not (?:override|append to config|delete)[^']*'([^']+)'", text)
    unreadable = [item.override for item in chain if isinstance(item, OverrideParseException)]
    wrong_type = next(
        (line for line in lines if re.search("could not be converted|is not a valid", line)), None
    )
    if wrong_type:
        key = re.search(r"full_key: (\S+)", text)
        return f"{key.group(1) if key else 'config'}: {wrong_type.rstrip('.')}."
    group = re.search(r"Could not find '([^']+)/([^/']+)'", text)
    if group:
        return _no_such_choice(group[1], group[2], chosen or [])
    if unknown:
        return _no_such_setting(unknown.group(1), text, chosen)
    if unreadable:
        return (
            f"cannot read {unreadable[0]!r}: give KEY=VALUE, and put a value with blanks, "
            "commas, =, quotes or brackets in quotes, for instance: 'data.train=\"my file.csv\"'."
        )
    return text[:600]


def _unresolved(text: str) -> str | None:
    """What to say of an interpolation without a value."""
    found = re.search(
        r"(?:resolving interpolation: \"?|(?=Interpolation key))(.*?)\"?\n.*?full_key: (\S+)",
        text,
        re.DOTALL,
    )
    return f"{found[2]}: {found[1].rstrip('.')}." if found else None


def _several_values(text: str) -> str | None:
    """What to say of KEY=A,B outside of a sweep."""
    found = re.search(r"Ambiguous value for argument '([^=]+)=(.*?)'", text)
    if found is None:
        return None
    key, values = found.groups()
    return (
        f"{key}={values} is several values: a sweep over them wants -m (lora-lightning train "
        f"-m {key}={values}), a list wants brackets ('{key}=[{values}]')."
    )


def all_keys(chosen: list[str] | None = None) -> list[str]:
    """Every settable key of the default config, or of one with other choices, dotted."""
    config = compose_config(chosen or [])

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, DictConfig):
            return []
        keys = []
        for name in map(str, node):
            keys.append(f"{prefix}{name}")
            if not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
                keys += walk(node[name], f"{prefix}{name}.")
        return keys

    return walk(config, "")


def over_saved(saved: dict[str, Any], overrides: list[str]) -> DictConfig:
    """A config as it was saved with an adapter, changed by this call's overrides.

    Raises:
        UserError: an override is wrong.
    """
    start = [f"task={saved['task'].get('name', 'sentiment')}"]
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
            OmegaConf.update(default, key, OmegaConf.select(asked, key), merge=False)
        elif not key.startswith("hydra."):  # a preset of several groups
            before = dict(_leaves(OmegaConf.to_container(plain)))
            for changed, value in _leaves(OmegaConf.to_container(asked)):
                if before.get(changed) != value:
                    OmegaConf.update(default, changed, value, force_add=True)
    return default


def saved_settings(config: DictConfig) -> dict[str, Any]:
    """Our own groups as plain values, to be kept with an adapter."""
    return {group: _as_object(config[group]) for group in OWN_GROUPS}


def config_hash(config: DictConfig) -> str:
    """Identifies what a run computes: the config without where it writes and how it is called."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    for key in ("output_dir", "tags", "logger"):
        plain.pop(key, None)
    text = json.dumps(plain, sort_keys=True)
    for old, new in RENAMED.items():  # so that sweeps and runs that were stopped are found again
        text = text.replace(new, old)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def instantiate_all(nodes: DictConfig) -> list[Any]:
    """The objects that a group such as `callbacks` names; entries set to null are skipped.

    Raises:
        UserError: see `instantiate_one`.
    """
    return [instantiate_one(nodes, name) for name, node in nodes.items() if node is not None]


def instantiate_one(nodes: DictConfig, name: Any) -> Any:
    """The object that an entry of a group names.

    Raises:
        UserError: it has no `_target_`, or its arguments do not fit.
    """
    from hydra.utils import instantiate

    node, key = nodes[name], nodes._get_full_key(name)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise UserError(f"{key} needs a _target_, the class to build; {key}=null removes it.")
    try:
        return instantiate(node)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(
            f"cannot build {key} from its _target_ {node._target_}: "
            f"{' '.join(str(cause).split())}{_beside(str(node._target_))} Correct it, or leave it "
            f"out: {key}=null."
        ) from error


def _beside(target: str) -> str:
    """What to type where the class is in a file of this folder, where Python does not look."""
    name = target.partition(".")[0]
    if not name.isidentifier() or find_spec(name):  # it was found: something else is wrong
        return ""
    if not (os.path.isfile(f"{name}.py") or os.path.isdir(name)):
        return ""
    return f" {name} is in this folder: put PYTHONPATH=. in front of the command."


def refuse_untyped(config: DictConfig, typed: list[str], source: str) -> list[str]:
    """Refuses a saved config that runs code of others, or reads more than itself.

    The folder's owner chose that; the caller types it again to allow it.

    Args:
        config: as it was saved.
        typed: overrides of this command line.
        source: the folder as it was typed, for the message.

    Returns:
        What was typed and need not be.

    Raises:
        UserError: something was not typed.
    """
    asked: dict[str, str] = {}
    for resolve in (False, True):  # what reads more than the config is not resolved untyped
        asked |= to_be_typed(config, resolve=resolve)
        if again := [item for item in asked if item not in typed]:
            raise UserError(
                f"{source}: its config {asked[again[0]]}. It may be of somebody else. If it is "
                f"yours, type it again: {source} {shlex.join(again)}"
            )
    return [item for item in typed if item not in asked]


def to_be_typed(config: DictConfig, *, resolve: bool = True) -> dict[str, str]:
    """The overrides that a resumed run needs again, with what each of them does.

    They are classes that are not of Lightning, torch or ours, code that comes with a base model,
    and interpolations that call something, such as `${oc.env:NAME}`.

    Args:
        config: as it was saved.
        resolve: whether to resolve interpolations and look at their values too.

    Raises:
        UserError: an interpolation cannot be resolved.
    """
    found: dict[str, str] = {}
    raw = dict(_leaves(OmegaConf.to_container(config, resolve=False)))
    for key, value in raw.items():
        if _calls(value) and key != "output_dir":  # which resume= sets
            found[f"{key}={value}"] = f"takes {key} from {value}"
    try:
        values = dict(_leaves(OmegaConf.to_container(config, resolve=True))) if resolve else raw
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    for key, value in values.items():
        does = None if isinstance(value, str) and "${" in value else _runs(key, value)
        if does is not None:
            shown = str(value).lower() if isinstance(value, bool) else value
            found[f"{key}={shown}"] = does
    return found


def _runs(key: str, value: Any) -> str | None:
    """What a setting runs that may be code of others; None: nothing."""
    if key.rpartition(".")[2] == "_target_" and value is not None and not _is_known(value):
        return (
            f"builds {key.removesuffix('._target_')} from {value}, which is not a class of "
            "Lightning, torch.optim or lora_lightning"
        )
    if key == "model.trust_remote_code" and value:
        return "runs Python code that comes with its base model"
    if key == "model.attn_implementation" and value and not is_installed_attention(value):
        return f"takes attention kernels from elsewhere: {value}"
    return None


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested dicts and lists, each with its value."""
    if not isinstance(node, (dict, list)):
        yield key, node
        return
    for name, part in node.items() if isinstance(node, dict) else enumerate(node):
        if name == "_target_" and isinstance(part, (dict, list)):
            part = str(part)
        yield from _leaves(part, f"{key}.{name}" if key else str(name))


def _calls(value: Any) -> bool:
    """Whether a value holds an interpolation that calls a resolver, not another setting alone."""
    text = value if isinstance(value, str) else ""
    while (less := re.sub(r"\$\{[^${}:]*\}", "", text)) != text:
        text = less
    return "${" in text


def _is_known(target: Any) -> bool:
    """Whether a `_target_` is a class that a resumed run may build."""
    if not isinstance(target, str) or not KNOWN_TARGETS.match(target):
        return False
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:
        return False
    home = f"{getattr(found, '__module__', '')}."  # a module's attributes may be of any other
    schedule = home == "transformers.optimization." and callable(found)
    return bool(schedule or (isinstance(found, type) and KNOWN_TARGETS.match(home)))


def read_yaml(path: Path) -> Any:
    """A file that Hydra wrote, with its interpolations as they are.

    Raises:
        UserError: the file is absent or broken.
    """
    try:
        return OmegaConf.load(path)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    except Exception as error:  # yaml errors have no common base that is worth importing
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None


def read_config(path: Path) -> DictConfig:
    """A config that a run saved.

    Raises:
        UserError: the file is absent or broken.
    """
    config = read_yaml(path)
    names = [key.name for key in fields(Schema)]
    if not isinstance(config, DictConfig) or not config.keys() >= set(names):
        of = config.keys() if isinstance(config, DictConfig) else ()
        raise UserError(
            f"{path} is not the config of a run, or it is damaged (it has no "
            f"{next(name for name in names if name not in of)}). If it is of a job of a sweep, "
            "run the sweep's command again, which writes it again."
        )
    return config


def read_run_config(path: Path) -> DictConfig:
    """A config that a run saved, each value of our own groups with the type that it has there.

    Raises:
        UserError: the file is absent or broken, or a value is of another kind.
    """
    config = read_config(path)
    schema = OmegaConf.structured(Schema)
    try:
        for group in (*OWN_GROUPS, "trainer", "logger", "callbacks"):
            if not isinstance(config[group], DictConfig):
                raise UserError(f"{group} is no mapping")
        for node in (*config.callbacks.values(), config.trainer.get("strategy")):
            if isinstance(node, DictConfig) and node.get("_target_") in RENAMED:
                node._target_ = RENAMED[node._target_]
        name = config.task.get("name")
        if not isinstance(name, str) or name not in TASK_CONFIGS:
            raise UserError(f"task.name={name}: there is no such task")
        schema.task = OmegaConf.structured(TASK_CONFIGS[name])
        merged = OmegaConf.merge(schema, config)
    except Exception as error:
        raise not_a_runs(path, error) from None
    assert isinstance(merged, DictConfig)
    return merged


def not_a_runs(path: Path, error: Exception) -> UserError:
    """What to tell where a value in the config that a run saved is of another kind.

    Args:
        path: the file.
        error: what its value led to.
    """
    where = re.search(r"full_key: (\S+)", str(error))
    told = explain(error).partition(" full_key:")[0].rstrip(".")[:600]
    key = f"{where[1]}: " if where and where[1] not in told else ""
    return UserError(f"{path} does not hold what a run saves: {key}{told or repr(error)}.")


def read_overrides(path: Path) -> list[str]:
    """The overrides that a run saved; none where there is no file.

    Raises:
        UserError: the file is broken.
    """
    if not path.is_file():
        return []
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(saved, list):
            raise TypeError("it holds no list")
        overrides = [str(item) for item in saved]
        for item in OverridesParser.create().parse_overrides(overrides):
            item.get_value_element_as_str()  # fails for several values: a run has one of each
    except Exception as error:  # yaml errors have no common base that is worth importing
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}.") from None
    return overrides


def _no_such_setting(name: str, text: str, chosen: list[str] | None) -> str:
    if name.startswith("hydra.launcher."):
        return _no_such_launcher_setting(name.removeprefix("hydra."))
    known = all_keys(chosen)
    if name in known:
        if "already at" in text:
            advice = "is there already: leave out the plus in front of it."
        else:
            advice = f"takes new entries with a plus in front: '+{name}={{NAME: VALUE}}'."
        return f"{name} {advice}"
    return (
        f"{name}: there is no such setting.{did_you_mean(name, known)} "
        "`lora-lightning train --cfg job` shows all; +KEY=VALUE adds one to trainer, logger "
        "or callbacks."
    )


def _no_such_launcher_setting(name: str) -> str:
    own = {
        "launcher.max_slots": "belongs to hydra/launcher=packed: add that.",
        "launcher.memory": "belongs to hydra/launcher=packed: add that.",
        "launcher.halving.eta": "is given with the rest: 'launcher.halving={eta: 2, rungs: 3}'.",
        "launcher.halving.rungs": "is given with the rest: 'launcher.halving={eta: 2, rungs: 3}'.",
        "launcher.halving.min_resource": "is given with the rest: "
        "'launcher.halving={eta: 2, rungs: 2, min_resource: 0.125}'.",
    }
    if name in own:
        return f"{name} {own[name]}"
    known = ("jobs", "gpus_per_job", "fail_fast", "halving", "max_slots", "memory")
    near = did_you_mean(name, [f"launcher.{key}" for key in known])
    return f"{name}: there is no such setting.{near} Launchers have {', '.join(known)}."


def _no_such_choice(group: str, choice: str, chosen: Sequence[str] = ()) -> str:
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return 'the Optuna sweeper is not installed: pip install "lora_lightning[optuna]".'
    if group == "hydra/launcher" and choice.startswith("submitit_"):
        return 'the submitit launcher is not installed: pip install "lora_lightning[slurm]".'
    known = choices(group, chosen)
    return (
        f"{group}={choice}: there is no such choice.{did_you_mean(choice, known)} "
        f"Known: {', '.join(known)}."
    )


def _as_object(node: Any) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
