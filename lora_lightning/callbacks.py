"""Callbacks and loggers of a run, under the names that configs use."""

from .training.callbacks.best_checkpoint import BestCheckpoint
from .training.callbacks.forgetting import Retention
from .training.callbacks.last_checkpoint import LastCheckpoint
from .training.callbacks.loggers import CurvesLogger, EventsLogger
from .training.callbacks.progress import (
    AdapterSummary,
    ProgressBar,
    SamplePredictions,
    UpdateNorms,
)
from .training.callbacks.throughput import RunClock, Throughput

__all__ = [
    "AdapterSummary",
    "BestCheckpoint",
    "CurvesLogger",
    "EventsLogger",
    "LastCheckpoint",
    "ProgressBar",
    "Retention",
    "RunClock",
    "SamplePredictions",
    "Throughput",
    "UpdateNorms",
]
