"""The curves of a run as CSV: Lightning's logger, whose file is never there in part."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ..atomic_write import atomic_write
from ..logs import read_metrics, tell_damaged
from ..lora.outputs import made_folder, sync


class CurvesLogger(CSVLogger):
    """Lightning's CSVLogger, which writes metrics.csv beside its place where it begins it again.

    Lightning 2.6 deletes an earlier file when it begins, and cuts the file to nothing wherever a
    column is new: a kill at that moment takes the curves. The earlier file stays until the first
    rows are written. On other file systems than the local one it is Lightning's.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and "://" not in self.log_dir:
            made_folder(Path(self.log_dir))
            self._experiment = _CurvesWriter(log_dir=self.log_dir)
        return super().experiment


class _CurvesWriter(ExperimentWriter):
    """Replaces the file at its first rows and where a column is new; else appends; both synced."""

    _header: list[str] | None = None
    """Columns of the file as this process has written it."""

    def _check_log_dir_exists(self) -> None:
        """Deletes nothing."""

    def save(self) -> None:
        if not self.metrics:
            return
        self._record_new_keys()
        path = Path(self.metrics_file_path)
        if self._header == self.metrics_keys:
            super().save()
            sync(path)  # a checkpoint that knows of these rows is on the disk soon
            return
        rows: list[dict[str, str]] = []
        if self._header is not None:
            rows, damaged = read_metrics(path)
            tell_damaged(path, damaged)
            names = (name for row in rows for name in row)  # others, where the header is damaged
            self.metrics_keys = list(dict.fromkeys([*self.metrics_keys, *names]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows([*rows, *self.metrics])
        atomic_write(path, text.getvalue())
        self.metrics, self._header = [], list(self.metrics_keys)
