"""Distributed training: shared state and the state of each rank."""
