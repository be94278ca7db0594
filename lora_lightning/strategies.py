"""Strategies for Lightning's Trainer, under the names that configs use."""

from .distributed.deepspeed import ZeroStrategy
from .distributed.strategies import DataParallelStrategy, OneDeviceStrategy, ShardedStrategy

__all__ = ["DataParallelStrategy", "OneDeviceStrategy", "ShardedStrategy", "ZeroStrategy"]
