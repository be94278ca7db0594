"""The jobs of a sweep in one process that has everything imported: one by one, or as one pack.

    python warm.py [--packed] OVERRIDES ... hydra.sweep.dir=FOLDER

The seconds that the jobs take, imports left out, go to FOLDER/seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lora_lightning.config.compose import compose_config
from lora_lightning.sweeps.packed.__main__ import main as train_together
from lora_lightning.training.run import train


def main() -> None:
    *overrides, place = sys.argv[1:]
    packed = "--packed" in overrides
    sweep = Path(place.partition("=")[2])
    jobs: list[list[str]] = [[]]
    for item in OverridesParser.create().parse_overrides([o for o in overrides if o[0] != "-"]):
        key = item.get_key_element()
        values = item.sweep_string_iterator() if item.is_sweep_override() else None
        choices = [f"{key}={value}" for value in values] if values else [str(item.input_line)]
        jobs = [[*job, choice] for job in jobs for choice in choices]
    started = time.monotonic()
    folders = [sweep / str(number) for number in range(len(jobs))]
    configs = [
        compose_config([*job, f"output_dir={folder}"])
        for job, folder in zip(jobs, folders, strict=True)
    ]
    if packed:
        for folder, config in zip(folders, configs, strict=True):
            (folder / ".hydra").mkdir(parents=True)
            OmegaConf.save(config, folder / ".hydra" / "config.yaml")
        if train_together(folders):
            raise SystemExit("the pack failed")
    else:
        for config in configs:
            train(config, enable_progress_bar=False)
    (sweep / "seconds").write_text(str(time.monotonic() - started))


if __name__ == "__main__":
    main()
