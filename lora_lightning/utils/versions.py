"""Versions of the installed packages that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "hydra-core")


def versions() -> dict[str, str]:
    """Return the versions of the software that a result depends on."""
    numbers = {"python": platform.python_version()}
    for package in ("lora_lightning", *PACKAGES):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers
