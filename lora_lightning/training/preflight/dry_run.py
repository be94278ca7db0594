"""Dry run of a training step on fake tensors, to measure memory before any weight is loaded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from lora_lightning.config.compose import settings_of
from lora_lightning.config.schema import OptimConfig
from lora_lightning.data.collators import LANE
from lora_lightning.data.examples import longest_input, tokens_at_a_time
from lora_lightning.lora import UserError
from lora_lightning.models.fake import fake_models
from lora_lightning.models.lm_head import trust_head
from lora_lightning.models.model_config import load_model_config, max_positions
from lora_lightning.models.private_api import unpacked_rows
from lora_lightning.tasks import build_task
from lora_lightning.tasks.generation import GenerativeTask
from lora_lightning.training.build import build_adapted_model
from lora_lightning.training.optim import build_optimizer
from lora_lightning.training.step_loss import task_loss

from .storage_tracker import StorageTracker

PARTS = ("weights", "gradients", "optimizer", "activations", "transient")
"""Parts of a step's memory.

"transient" is what the backward pass and the optimizer hold temporarily. It includes the one layer
that gradient checkpointing recomputes.
"""
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
MOST_ROWS = 2**16
"""Upper limit of the search for the largest batch, in rows."""
Bytes = dict[str, int]


class DryRun:
    """A run's model, optimizer and loss on fake tensors, for dry runs of training steps.

    Every example has the full length, and all its tokens are targets. No batch needs more memory.

    Args:
        config: Run config with resolved precision (`with_precision`).
        device: Device that the run would train on.
        tracker: Tracker of live tensors, active before the model is built.
    """

    def __init__(self, config: DictConfig, device: torch.device, tracker: StorageTracker) -> None:
        settings = settings_of(config)
        self.device, self.tracker = device, tracker
        self.clip = config.trainer.get("gradient_clip_val")
        self.autocast = AUTOCAST.get(config.trainer.precision)
        self.task = build_task(settings.task)
        model_config = load_model_config(settings.model)
        self.task.prepare(model_config)
        self.task.assume_labels()
        self.length = longest_input(settings.data, max_positions(model_config))
        self.joined = settings.data.packing or self.task.joins_rows
        self.rows_in_lane = max(1, LANE // self.length) if self.joined else 1
        tokens = tokens_at_a_time(settings.data, device.type)
        lanes = None if tokens is None else max(1, tokens // (self.rows_in_lane * self.length))
        self.at_a_time = None if lanes is None else lanes * self.rows_in_lane
        """Full-length rows that are computed together; None means the whole batch."""
        tracker.part = "weights"
        self.offload = settings.model.offload_activations
        self.optim = replace(settings.optim, options=_as_on(device, settings.optim))
        # No LoraModule: its metrics copy their states, and copies of fake tensors damage memory
        # (torch 2.13 frees the weak references of FakeTensorMode twice).
        built = build_adapted_model(
            self.task,
            replace(settings.model, compile=None),
            settings.lora,
            SimpleNamespace(pad_token_id=0),
        )
        self.model, self.adapter = built.model, built.adapter
        trust_head(self.model)
        gc.collect()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: tracker.assign([p.grad], "gradients")
            )
        self.optimizer_step = self._optimizer_step()

    def _optimizer_step(self) -> Bytes:
        """Return the peak bytes by part of an optimizer step, which do not depend on the rows.

        The optimizer state that the first step creates stays allocated.
        """
        from_zero = [] if self.adapter is None else self.adapter.zero_initialized()
        optimizer = build_optimizer(self.model.named_parameters(), self.optim, from_zero=from_zero)
        self._add_gradients()
        self.tracker.part = "optimizer"
        try:
            optimizer.step()
            self.tracker.part = "transient"
            self.tracker.peak.clear()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
            optimizer.step()
        except RuntimeError as error:  # the step reads values, which fake tensors lack
            raise UserError(
                f"optim.name={self.optim.name} is not supported by plan: its step "
                "reads values. Use AdamW here, or lora-lightning check."
            ) from error
        optimizer.zero_grad()
        self.states = optimizer.state
        return self.peak()

    def _add_gradients(self) -> None:
        self.tracker.part = "gradients"
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)

    def peak(self) -> Bytes:
        """Return the bytes by part at the memory peak so far."""
        return {part: self.tracker.peak[part] for part in PARTS}

    def step(self, rows: int) -> Bytes:
        """Return the peak bytes by part of a step over `rows` rows."""
        if self.at_a_time is not None and rows > self.at_a_time:
            rows = self.at_a_time
            self._add_gradients()  # they exist for each micro-batch but the first
        self.tracker.peak.clear()
        self.forward(rows).backward()
        for parameter in self.trained:
            parameter.grad = None
        return max(self.peak(), self.optimizer_step, key=total)

    def forward(self, rows: int) -> Tensor:
        """Return the loss of `rows` rows.

        The activations alive afterwards are the tensors that autograd keeps.
        """
        self.tracker.part = "activations"
        mixed = self.autocast is not None
        with (
            torch.autocast(self.device.type, self.autocast) if mixed else nullcontext(),
            nullcontext() if self.joined else unpacked_rows(),
        ):
            batch = self.batch(rows)
            loss = task_loss(self.task, self.model, batch, self.device, offload=self.offload).total
        self.tracker.part = "transient"
        return loss

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Build a batch of full-length rows in the format of the task's loss."""
        lanes = -(-rows // self.rows_in_lane)
        width = min(rows, self.rows_in_lane) * self.length
        ids = torch.zeros(lanes, width, dtype=torch.long)
        if not isinstance(self.task, GenerativeTask):
            return {"input_ids": ids, "attention_mask": ids.clone(), "labels": ids[:, 0].clone()}
        batch = {"input_ids": ids, "labels": ids.clone()}
        both = self.task.encoder_decoder
        batch["places"] = torch.arange(rows * (self.length if both else self.length - 1))
        if both:
            batch["attention_mask"] = ids.clone()
        elif self.joined:
            batch["position_ids"] = ids.clone()
        return batch


@contextmanager
def dry_run(config: DictConfig, device: torch.device) -> Iterator[DryRun]:
    """Yield a `DryRun`, which needs the model's config.json but no weights.

    Args:
        config: Run config with resolved precision.
        device: Device that the run would train on.

    Raises:
        UserError: If the settings do not fit the model.
    """
    with fake_models(device), StorageTracker(device.type) as tracker:
        yield DryRun(config, device, tracker)


def total(parts: Bytes) -> int:
    """Return the sum of the bytes of all parts."""
    return sum(parts.values())


def most_rows(need: Callable[[int], int], limit: int, rows: int) -> int:
    """Return the largest number of rows that needs at most `limit` bytes, or 0 if none fits.

    Bytes are constant in the rows while the optimizer step is the peak, then grow linearly.
    A line through two sizes therefore never overestimates a larger size.
    Sizes that the line puts above the limit need no measurement.

    Args:
        need: Function from a number of rows to bytes.
        limit: Memory limit in bytes.
        rows: Number of rows to start the search with.
    """
    sizes: dict[int, int] = {}
    low, high, guess = 0, MOST_ROWS + 1, rows
    while high - low > 1:
        sizes[guess] = need(guess)
        low, high = (guess, high) if sizes[guess] <= limit else (low, guess)
        first, last = [0, 0, *sorted(size for size in sizes if size <= low)][-2:]
        slope = (sizes[last] - sizes[first]) / (last - first) if first else 0.0
        if low == 0:
            guess = 1
        elif slope > 0:
            high = min(high, low + int((limit - sizes[low]) / slope) + 1)
            guess = high - 1
        elif high in sizes:
            guess = (low + high) // 2
        else:
            guess = min(max(2 * low if first else low + 1, low * limit // sizes[low]), MOST_ROWS)
    return low


def _as_on(device: torch.device, config: OptimConfig) -> dict[str, Any]:
    """Return optimizer arguments that select the implementation used for real GPU tensors."""
    optimizer = getattr(torch.optim, config.name, None)
    takes = device.type == "cuda" and optimizer and "foreach" in signature(optimizer).parameters
    return {"foreach": True, **config.options} if takes else config.options
