"""Callbacks and loggers: what a run saves, shows and measures beside its scalars."""

from .curves import CurvesLogger, EventsLogger
from .kept import BestCheckpoint, LastCheckpoint, Paused
from .measured import RunClock, Throughput
from .shown import AdapterSummary, ProgressBar, SamplePredictions, UpdateNorms

__all__ = [
    "AdapterSummary",
    "BestCheckpoint",
    "CurvesLogger",
    "EventsLogger",
    "LastCheckpoint",
    "Paused",
    "ProgressBar",
    "RunClock",
    "SamplePredictions",
    "Throughput",
    "UpdateNorms",
]
