"""Installed as `hydra_plugins.lora_lightning`, the only place that Hydra takes plugins from."""

from lora_lightning.launch.packed import PackedLauncher
from lora_lightning.launch.process import ProcessLauncher

__all__ = ["PackedLauncher", "ProcessLauncher"]
