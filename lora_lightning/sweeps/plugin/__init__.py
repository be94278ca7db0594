"""Installed as `hydra_plugins.lora_lightning`, the only place that Hydra takes plugins from."""

from lora_lightning.sweeps.launcher import ProcessLauncher
from lora_lightning.sweeps.packed_launcher import PackedLauncher

__all__ = ["PackedLauncher", "ProcessLauncher"]
