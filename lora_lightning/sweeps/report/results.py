"""Data of a sweep: its runs, their differences, and the best setting."""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lora_lightning.config.compose import direction
from lora_lightning.config.monitor import direction_of
from lora_lightning.errors import UserError
from lora_lightning.lora.config import LoraConfig
from lora_lightning.sweeps.grouping import group_by

SEED = "seed"
PLACES = ("output_dir", "hydra.sweep.dir", "hydra.run.dir")


@dataclass
class Run:
    """A run of a sweep, as read from its folder."""

    folder: Path
    config: DictConfig
    overrides: list[str]
    result: dict[str, Any]
    lora: LoraConfig | None = None
    """The adapter's settings; None for full fine-tuning."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """The monitored metric at each validation: optimizer step and value."""
    presets: list[str] = field(default_factory=list)
    """Arguments that locate the user's own presets: --config-name, hydra.searchpath."""

    @property
    def job(self) -> str:
        """Number of the run in the sweep, which is the name of its folder."""
        return self.folder.name

    @property
    def status(self) -> str:
        """completed, running, failed, interrupted, paused, stopped (by halving), or waiting.

        A run that waits in a sweep that has ended is `not started`.
        """
        return str(self.result.get("status", "waiting"))

    @property
    def objective(self) -> float | None:
        """Final value of the monitored metric; None before the end, or if it is not a number."""
        return self.final("objective")

    def final(self, name: str) -> float | None:
        """Return a finite number of a completed run; None if there is none."""
        value = self.result.get(name)
        number = isinstance(value, (int, float)) and math.isfinite(value)
        return float(value) if number and self.status == "completed" else None  # type: ignore[arg-type]

    @cached_property
    def given(self) -> dict[str, str]:
        """Overrides by key."""
        parsed = OverridesParser.create().parse_overrides(self.overrides)
        return {
            item.get_key_element().lstrip("+"): item.get_value_element_as_str() for item in parsed
        }

    @property
    def adapter(self) -> dict[str, Any]:
        """Rank, alpha and the effective scale alpha / r (rsLoRA: alpha / sqrt(r))."""
        if self.lora is None:
            return {"rank": None, "alpha": None, "scale": None}
        lora = self.lora
        return {"rank": lora.rank, "alpha": lora.alpha_of(""), "scale": lora.scaling_of("")}

    @property
    def steps(self) -> int:
        """Optimizer steps made, as far as known; for an active run, up to its last rung."""
        rungs = self.result.get("rungs") or [{"step": 0}]
        return max(int(self.result.get("steps") or 0), int(rungs[-1]["step"]))

    @property
    def command(self) -> str:
        """Command that runs this job alone."""
        return self.command_without()

    def command_without(self, *keys: str) -> str:
        """Return the command that runs this job alone, with some settings left at their default."""
        left = (*PLACES, *keys)
        items = [item for item in self.overrides if item.lstrip("+").split("=")[0] not in left]
        return shlex.join(["lora-lightning", "train", *self.presets, *items])


@dataclass
class Setting:
    """Runs that differ only in their seed."""

    values: dict[str, str]
    """Values that distinguish this setting from the others."""
    runs: list[Run]

    def mean(self, metric: str) -> float | None:
        """Return the mean over the completed runs."""
        values = self._values(metric)
        return statistics.fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Return the sample deviation (n - 1); None for fewer than two runs."""
        values = self._values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def variance_of_mean(self, metric: str) -> float:
        """Return the squared standard error of the mean.

        It is 0 for fewer than two runs, which give no estimate.
        """
        deviation = self.deviation(metric)
        return 0.0 if deviation is None else deviation**2 / len(self._values(metric))

    @property
    def name(self) -> str:
        """Values that distinguish this setting from the others, as they are typed."""
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "the one setting"

    @property
    def jobs(self) -> str:
        """Numbers of the runs of this setting."""
        return " ".join(run.job for run in self.runs)

    def _values(self, metric: str) -> list[float]:
        found = [run.final(metric) for run in self.runs]
        return [value for value in found if value is not None]


@dataclass
class Sweep:
    """All runs of a sweep."""

    folder: Path
    runs: list[Run]
    resume: str = ""
    """Command that resumes the sweep; "" if it runs or is complete."""

    @cached_property
    def varied(self) -> list[str]:
        """Keys whose values differ between runs, with the seed last."""
        keys = dict.fromkeys(key for run in self.runs for key in run.given)
        different = [
            key
            for key in keys
            if key not in PLACES and len({run.given.get(key) for run in self.runs}) > 1
        ]
        return sorted(different, key=lambda key: key == SEED)

    @cached_property
    def settings(self) -> list[Setting]:
        """Runs grouped by all varied values except the seed, the best setting first."""
        keys = [key for key in self.varied if key != SEED]
        groups = group_by(self.runs, lambda run: tuple(run.given.get(key, "") for key in keys))
        settings = [
            Setting(dict(zip(keys, values, strict=True)), runs) for values, runs in groups.items()
        ]

        def order(setting: Setting) -> tuple[bool, float]:
            mean = setting.mean("objective")
            return (mean is None, 0.0 if mean is None else -self.sign * mean)

        return sorted(settings, key=order)

    @property
    def monitor(self) -> str:
        """Name of the metric that ranks the settings."""
        return str(self.runs[0].config.task.monitor)

    @property
    def sign(self) -> int:
        """1 if a higher metric is better, else -1."""
        try:
            return -1 if direction(self.runs[0].config) == "min" else 1
        except UserError:  # run of an earlier version, which accepted such a mode
            return -1 if direction_of(self.monitor) == "min" else 1

    @property
    def best(self) -> Setting | None:
        """The setting with the best mean over its seeds."""
        first = self.settings[0]
        return first if first.mean("objective") is not None else None

    @property
    def rows(self) -> int | None:
        """Number of rows behind the metric; None if no run reports it, or the runs differ."""
        split = self.monitor.partition("/")[0]
        counts = {
            run.result.get("rows", {}).get(split) for run in self.runs if run.objective is not None
        }
        return counts.pop() if len(counts) == 1 else None

    def ties(self) -> list[Setting]:
        """Return the settings that the measurements cannot distinguish from the best.

        Their means are within two standard errors of the best mean. The variance covers the seeds
        and, for a metric that is a fraction of rows, the sampling of rows. A single seed gives no
        estimate of the former. The latter assumes independent rows, which overestimates the
        variance if both settings are measured on the same rows.
        """
        best = self.best
        if best is None:
            return []
        others = [one for one in self.settings if one is not best]
        return [one for one in others if self._is_tie(best, one)]

    def _is_tie(self, best: Setting, other: Setting) -> bool:
        high, low = best.mean("objective"), other.mean("objective")
        if high is None or low is None:
            return False
        variance = sum(one.variance_of_mean("objective") for one in (best, other))
        if self.rows and self.is_fraction:
            variance += sum(mean * (1 - mean) / self.rows for mean in (high, low))
        return abs(high - low) <= 2 * math.sqrt(variance)

    @property
    def is_fraction(self) -> bool:
        """Whether the monitored metric is between 0 and 1, and counts rows."""
        return self.monitor.partition("/")[2] in ("accuracy", "f1", "auroc")

    @property
    def metrics(self) -> list[str]:
        """Names of the final metrics, validation before test."""
        names = {n for run in self.runs for n in run.result if n.startswith(("val/", "test/"))}
        return sorted(names, key=lambda name: (name.startswith("test/"), name))

    @property
    def headline(self) -> str | None:
        """Test counterpart of the monitored metric; None if there is none."""
        name = self.monitor.replace("val/", "test/", 1)
        return name if name in self.metrics else None

    @property
    def failed(self) -> list[Run]:
        """Runs that failed."""
        return [run for run in self.runs if run.status == "failed"]

    @property
    def stopped(self) -> list[Run]:
        """Runs that successive halving stopped."""
        return [run for run in self.runs if run.status == "stopped"]

    @property
    def fraction_of_steps(self) -> float | None:
        """Optimizer steps made, as a fraction of the steps of all runs to their end.

        None without successive halving.
        """
        rungs = [run.result["rungs"] for run in self.runs if run.result.get("rungs")]
        if not rungs:
            return None
        planned = max(first["planned"] for first, *_ in rungs)
        return float(sum(run.steps for run in self.runs) / (planned * len(self.runs)))

    def counts(self) -> str:
        """Return the number of runs for each status."""
        every = [run.status for run in self.runs]
        return ", ".join(f"{every.count(status)} {status}" for status in dict.fromkeys(every))
