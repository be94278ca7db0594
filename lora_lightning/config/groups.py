"""Groups of a config as dataclasses, which Hydra checks and a run is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

from lora_lightning.lora.config import LoraConfig
from lora_lightning.utils.checks import check_choice

from .monitor import direction_of
from .presets import preset_table, primary
from .schema import DataConfig, LauncherConfig, ModelConfig, OptimConfig
from .tasks import TASK_ALIASES, TASK_CONFIGS

METHODS = ("lora", "full")
LARGEST_SEED = 2**32 - 1
"""Largest seed that numpy supports."""


@dataclass
class LoraSchema(LoraConfig):
    """Config group `lora`, with the adapter's settings and whether there is an adapter at all."""

    method: str = "lora"
    """"lora", or "full" to fine-tune the whole model as the baseline (lora=full)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lora.method", self.method, METHODS)


@dataclass
class Schema:
    """Complete config of a run. Our own groups are typed, and Lightning's groups are free."""

    # MISSING replaces the class default, because `name_or_path: ???` in a file does not undo it.
    model: ModelConfig = field(default_factory=lambda: ModelConfig(name_or_path=MISSING))
    task: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraSchema = field(default_factory=LoraSchema)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Seed of the initialization, the batch order and dropout."""
    output_dir: str = ""
    """Folder of the run."""
    test_before: bool = True
    """Also test the model before training, to show what training gained."""
    adapter: str | None = None
    """Adapter folder to start training from, of the same rank and targets, or a checkpoint of a run
    (RUN_DIR/checkpoints/last.ckpt). None means a new adapter."""
    resume: str | None = None
    """Folder of a stopped run to resume, with its own config. auto resumes the run in output_dir if
    there is one, else begins it. None begins a run."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tags: list[str] = field(default_factory=list)
    """Free words kept with the run."""


STARTING = ("resume", "launcher")
"""Keys that say how a run is started, and nothing about what it computes."""


@dataclass
class Settings:
    """Our own groups as the objects that the package works with."""

    model: ModelConfig
    task: dict[str, Any]
    data: DataConfig
    lora: LoraConfig | None
    optim: OptimConfig


def register_schemas() -> None:
    """Register the schemas with Hydra under the names that conf/ refers to."""
    store = ConfigStore.instance()
    store.store(name="base_schema", node=Schema)
    for name, schema in TASK_CONFIGS.items():
        store.store(group="task", name=f"{name}_schema", node=schema)
    for alias, name in TASK_ALIASES.items():  # for presets of users
        store.store(group="task", name=f"{alias}_schema", node=TASK_CONFIGS[name])
    OmegaConf.register_new_resolver("direction", direction_of, replace=True)  # for sweep=optuna
    OmegaConf.register_new_resolver("preset_table", preset_table, replace=True)  # for --help


def composed(overrides: list[str], *, with_hydra: bool = False) -> DictConfig:
    """Return conf/train.yaml with overrides. Hydra's errors pass through."""
    register_schemas()
    GlobalHydra.instance().clear()
    with primary.initialized():
        return compose(primary.name, overrides=overrides, return_hydra_config=with_hydra)
