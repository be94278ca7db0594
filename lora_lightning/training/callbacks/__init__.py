"""Callbacks and loggers for checkpoints, curves, signals and displayed output."""
