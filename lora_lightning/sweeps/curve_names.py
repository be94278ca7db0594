"""Names of the TensorBoard curves of a sweep's jobs."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, open_dict

EVENTS_LOGGER = "lora_lightning.callbacks.EventsLogger"
TENSORBOARD_FOLDER = "tensorboard"
"""Folder of the curves in a run that is not a job."""
ABBREVIATIONS = {"lora.rank": "r", "lora.alpha": "a", "seed": "s"}
MAX_LENGTH = 120
"""Maximum length of a curve's name, which is also a folder name."""


def curves_name(varied: dict[str, str]) -> str:
    """Return the TensorBoard name of a job's curves, after its number: `r16 a32 lr=0.001 s1`.

    It is a valid folder name.
    """
    order = {"seed": 2, "lora.rank": -2, "lora.alpha": -1}
    parts = [
        f"{ABBREVIATIONS[key]}{varied[key]}"
        if key in ABBREVIATIONS
        else f"{key.split('.')[-1]}={varied[key]}"
        for key in sorted(varied, key=lambda key: order.get(key, 0))
    ]
    return re.sub(r"[^\w.=+ -]", "_", " ".join(parts), flags=re.ASCII)[:MAX_LENGTH].strip(" .")


def name_curves(config: DictConfig, folder: Path, varied: dict[str, str]) -> None:
    """Make a job write its curves under a name that distinguishes it within its sweep.

    A job that has already begun keeps its folder, even if an earlier version began it.
    """
    logger = config.logger.get("tensorboard")
    name = curves_name(varied)
    if not isinstance(logger, DictConfig) or logger.get("_target_") != EVENTS_LOGGER or not name:
        return
    if logger.get("name") == TENSORBOARD_FOLDER and not (folder / TENSORBOARD_FOLDER).is_dir():
        with open_dict(config):
            logger.name = name
            logger.varied = list(varied)
