"""Trainings that tests share, and what a run's folder says."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.asserts import contents
from lora_lightning.config.compose import compose_config

QUIET = [
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
]
"""Overrides of a run on the CPU that prints little."""


class TrainedRuns:
    """Run folders by their overrides; each is trained when a test first asks for it.

    Every test gets the same folder. A test that changes files copies the folder first.

    Args:
        root: Folder for the runs.
        defaults: Overrides of every run. A later override of the same key wins.
    """

    def __init__(self, root: Path, defaults: list[str]) -> None:
        self.root, self.defaults = root, defaults
        self.runs: dict[tuple[str, ...], Path] = {}
        self.contents: dict[tuple[str, ...], dict[str, bytes | None]] = {}

    def __call__(self, *overrides: str) -> Path:
        """Return the folder of a completed run, with the config that the command line leaves."""
        if overrides not in self.runs:
            run = self.root / str(len(self.runs)) / "run"
            config = compose_config([*self.defaults, *overrides, f"output_dir={run}"])
            self.root.mkdir(parents=True, exist_ok=True)
            from lora_lightning.training.run import train

            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.root)
                train(config)
            (run / ".hydra").mkdir()
            OmegaConf.save(config, run / ".hydra" / "config.yaml")
            self.runs[overrides], self.contents[overrides] = run, contents(run)
        return self.runs[overrides]

    def check_unchanged(self) -> None:
        """Fail if a test changed a run that others share."""
        for overrides, run in self.runs.items():
            assert contents(run) == self.contents[overrides], f"a test changed {run}"


def result_of(run: Path) -> dict:
    """Return a run's result.json."""
    return json.loads((run / "result.json").read_text())


def csv_rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's CSV log."""
    with (run / "csv" / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def logged(run: Path, name: str) -> list[float]:
    """Return the values of a metric in a run's CSV log."""
    return [float(row[name]) for row in csv_rows(run) if row.get(name)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds, while the process runs."""
    until = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
