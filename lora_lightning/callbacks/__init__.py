"""Callbacks: what a run saves, shows and measures beside its scalars."""

from .kept import BestCheckpoint, LastCheckpoint, Paused
from .measured import RunClock, Throughput
from .shown import AdapterSummary, ProgressBar, SamplePredictions, UpdateNorms

__all__ = [
    "AdapterSummary",
    "BestCheckpoint",
    "LastCheckpoint",
    "Paused",
    "ProgressBar",
    "RunClock",
    "SamplePredictions",
    "Throughput",
    "UpdateNorms",
]
