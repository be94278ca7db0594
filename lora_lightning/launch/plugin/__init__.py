"""Installed as `hydra_plugins.lora_lightning`, the only place that Hydra takes plugins from."""

from lora_lightning.launch.process import ProcessLauncher

__all__ = ["ProcessLauncher"]
