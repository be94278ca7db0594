"""Find the packages of the wheel, so that none is forgotten. pyproject.toml holds the rest."""

from setuptools import find_packages, setup

MAPPED = {
    "lora_lightning.conf": "conf",
    "hydra_plugins.lora_lightning": "lora_lightning/sweeps/plugin",
}
"""Packages whose folder in this repository has another path."""

found = find_packages(
    include=["lora_lightning", "lora_lightning.*"],
    exclude=["lora_lightning.conf", "lora_lightning.sweeps.plugin"],
)
setup(packages=[*found, *MAPPED], package_dir=MAPPED)
