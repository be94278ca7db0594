"""A run of a pack, and its requests to the base."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from lora_lightning.training.module import LoraModule


@dataclass
class Forward:
    """A run's call of its backbone: inputs, and the torch state to run them under."""

    leaves: list[Any]
    shape: Any
    training: bool
    grad: bool
    inference: bool
    autocast: tuple[bool, torch.dtype]
    order: tuple[int, int]
    answer: Any = None
    error: BaseException | None = None

    @property
    def key(self) -> Any:
        """Key that is equal for calls that can be stacked."""
        leaves = tuple(
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in self.leaves
        )
        return self.order, leaves, str(self.shape), self.training, self.grad, self.autocast

    def asks_the_same(self, other: Forward) -> bool:
        """Return whether the inputs of two stackable calls are equal too."""
        pairs = zip(self.leaves, other.leaves, strict=True)
        return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))

    @property
    def tokens(self) -> int:
        """Number of tokens: rows x positions."""
        return next(leaf.shape[:2].numel() for leaf in self.leaves if isinstance(leaf, Tensor))


@dataclass
class Pass:
    """A stacked forward pass that waits for the gradients of its outputs."""

    slots: list[Slot]
    outputs: list[Tensor]
    """Outputs that require a gradient."""
    parts: dict[int, list[Tensor]]
    """Rows of each output by slot, detached from the graph."""


@dataclass
class Backward:
    """A run's report that its part of a pass's outputs has its gradient."""

    forward_pass: Pass
    answer: Any = None
    error: BaseException | None = None


@dataclass
class Slot:
    """A run, its thread, and the request that it waits for."""

    number: int
    folder: Path
    config: DictConfig
    out: TextIO
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    request: Forward | Backward | None = None
    random: Any = None
    """State of the generators while another thread works."""
    module: LoraModule | None = None
    trainer: L.Trainer | None = None
    has_fit: bool = False
    is_base: bool = False
    """Whether the backbone computes the same as the bare base, because each B is still zero."""
    passed: Pass | None = None
    """The pass whose backward pass is pending."""
    ended: bool = False
    error: BaseException | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Progress of the run: tests before training, batches, tests after training."""
        assert self.trainer is not None
        if self.trainer.state.fn == "fit":
            return 1, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return (2 if self.has_fit else 0), 0
