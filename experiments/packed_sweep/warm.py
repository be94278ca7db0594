"""The jobs of a sweep one after another in one process: what is imported stays imported."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from lora_lightning.config import compose_config
from lora_lightning.train import train


def main() -> None:
    *overrides, place = sys.argv[1:]
    sweep = Path(place.partition("=")[2])
    jobs: list[list[str]] = [[]]
    for item in OverridesParser.create().parse_overrides(overrides):
        key = item.get_key_element()
        values = item.sweep_string_iterator() if item.is_sweep_override() else None
        choices = [f"{key}={value}" for value in values] if values else [str(item.input_line)]
        jobs = [[*job, choice] for job in jobs for choice in choices]
    for number, job in enumerate(jobs):
        train(
            compose_config([*job, f"output_dir={sweep / str(number)}"]), enable_progress_bar=False
        )


if __name__ == "__main__":
    main()
