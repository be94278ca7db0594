"""Launcher plugins, installed as `hydra_plugins.lora_lightning`.

Hydra takes plugins only from there.
"""

from lora_lightning.sweeps.launcher import ProcessLauncher
from lora_lightning.sweeps.packed_launcher import PackedLauncher

__all__ = ["PackedLauncher", "ProcessLauncher"]
