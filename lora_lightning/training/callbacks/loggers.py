"""Lightning's loggers for the curves of a run, made safe against a failing disk."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lora_lightning.utils.atomic_write import atomic_write, fault_of_disk
from lora_lightning.utils.logs import read_metrics, tell_damaged
from lora_lightning.utils.output_folders import create_folder, sync
from lora_lightning.utils.terminal import say


class StepsFromOne:
    """A logger mixin that puts a metric of the first step at step 1, as the rest of a run does.

    In `fit`, Lightning logs a metric at the number of steps before the current one.
    """

    trainer: L.Trainer | None = None
    """Trainer of the run. None leaves steps as they are given."""

    @property
    def shift(self) -> int:
        """Offset that is currently added to a step."""
        return 0 if self.trainer is None or self.trainer.state.fn != "fit" else 1

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + self.shift)  # type: ignore[misc]


def count_from(trainer: L.Trainer, first_step: int) -> None:
    """Make a run's own loggers count its steps from 1, or from 0 as earlier versions did."""
    for logger in trainer.loggers:
        if isinstance(logger, StepsFromOne) and first_step == 1:
            logger.trainer = trainer


def log_after(trainer: L.Trainer, values: dict[str, float], steps: int) -> None:
    """Log values of the state after a number of steps."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=steps - getattr(logger, "shift", 0))


class EventsLogger(StepsFromOne, TensorBoardLogger):
    """A TensorBoardLogger that stops, without ending the run, when its disk fails.

    It reports that once. The other logger's file, metrics.csv, has the same values.

    Args:
        varied: Settings in which the jobs of a sweep differ. Their columns come first in HPARAMS.
            Defaults to ().
        settings: Settings of Lightning's TensorBoardLogger.
    """

    _has_ended = False

    def __init__(self, *args: Any, varied: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.varied = list(varied)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return _Tried(self, self.tried(lambda: super(EventsLogger, self).experiment))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.tried(super().log_hyperparams, *args, **kwargs)

    def fill_hparams(self, summaries: list[Any]) -> None:
        """Write the summaries that the HPARAMS tab reads."""

        def write() -> None:
            writer = super(EventsLogger, self).experiment._get_file_writer()
            for summary in summaries:
                writer.add_summary(summary)

        self.tried(write)

    def save(self) -> None:
        self.tried(super().save)

    def finalize(self, status: str) -> None:
        self.tried(super().finalize, status)

    def tried(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of a call, or None if the disk fails or failed in an earlier call."""
        if self._has_ended:
            return None
        try:
            return write(*args, **kwargs)
        except Exception as error:
            if (fault := fault_of_disk(error)) is None:
                raise
            self._has_ended = True
            say(f"no more curves for TensorBoard: {fault}. The run continues.", file=sys.stderr)
            return None


class _Tried:
    """TensorBoard's writer, with each call guarded against a failing disk."""

    def __init__(self, logger: EventsLogger, writer: Any) -> None:
        self._logger, self._writer = logger, writer or _DummyExperiment()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self._logger.tried(value, *args, **kwargs)


class CurvesLogger(StepsFromOne, CSVLogger):
    """A CSVLogger that writes a new metrics.csv beside its final path before it replaces the old.

    Lightning 2.6 deletes an earlier file at the start, and truncates the file whenever a column is
    new. A kill at that moment loses the curves. Here the earlier file stays until the first rows
    are written. On file systems other than the local one, Lightning's own writer is used.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and "://" not in self.log_dir:
            create_folder(Path(self.log_dir))
            self._experiment = _CurvesWriter(log_dir=self.log_dir)
        return super().experiment


class _CurvesWriter(ExperimentWriter):
    """A writer that replaces the file at the first rows and at a new column, otherwise appends.

    It syncs the file in both cases.
    """

    _header: list[str] | None = None
    """Columns of the file as written by this process."""

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""

    def save(self) -> None:
        if not self.metrics:
            return
        self._record_new_keys()
        path = Path(self.metrics_file_path)
        if self._header == self.metrics_keys:
            super().save()
            sync(path)  # a checkpoint that relies on these rows is on the disk soon
            return
        rows: list[dict[str, str]] = []
        if self._header is not None:
            rows, damaged = read_metrics(path)
            tell_damaged(path, damaged)
            names = (name for row in rows for name in row)  # they differ if the header is damaged
            self.metrics_keys = list(dict.fromkeys([*self.metrics_keys, *names]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows([*rows, *self.metrics])
        atomic_write(path, text.getvalue())
        self.metrics, self._header = [], list(self.metrics_keys)
