"""Callbacks: what a run saves, shows and measures beside its scalars."""

from .last import LastCheckpoint, Paused
from .measured import RunClock, Throughput
from .shown import AdapterSummary, ProgressBar, SamplePredictions, UpdateNorms

__all__ = [
    "AdapterSummary",
    "LastCheckpoint",
    "Paused",
    "ProgressBar",
    "RunClock",
    "SamplePredictions",
    "Throughput",
    "UpdateNorms",
]
