"""Callbacks and loggers: checkpoints, curves, signals, and what a run shows."""
