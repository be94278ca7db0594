"""Checks and memory estimates for a run before it starts."""
