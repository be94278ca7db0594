"""Loss of an optimizer step over its micro-batches and ranks, and a check that it is finite."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lora_lightning.distributed.strategies import scale_gradients, sum_over_ranks
from lora_lightning.lora import UserError
from lora_lightning.models.offload import offloaded_activations
from lora_lightning.models.private_api import masks_without_waiting
from lora_lightning.tasks import Task
from lora_lightning.tasks.base import LossOutput
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.run_folder import RunFolder


def task_loss(
    task: Task, model: nn.Module, batch: dict[str, Any], device: torch.device, *, offload: bool
) -> LossOutput:
    """Return the task's loss of a batch in training.

    Args:
        task: Task of the run.
        model: Model with its adapter.
        batch: Batch on the device.
        device: Device of the model.
        offload: Whether activations wait for the backward pass in host memory.
    """
    offloaded = offloaded_activations(model) if offload else nullcontext()
    with offloaded, masks_without_waiting(device):
        return task.loss(model, batch)


class StepLoss:
    """Summed loss and number of targets of the micro-batches of an optimizer step.

    The loss of a step is the mean over all its targets, across micro-batches and ranks.
    """

    def __init__(self) -> None:
        self._totals: Tensor | None = None
        """Summed loss and number of targets so far, (2)."""

    def add(self, output: LossOutput) -> None:
        """Add a micro-batch."""
        totals = torch.stack([output.total.detach().float(), output.count.detach().float()])
        self._totals = totals if self._totals is None else self._totals + totals

    def finish(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> Tensor:
        """Divide the step's gradients by its targets, and return its mean loss, a scalar.

        Lightning has divided the gradients by the number of ranks, which this undoes. All ranks
        must call this.
        """
        assert self._totals is not None, "a step without a micro-batch"
        loss, count = sum_over_ranks(trainer.strategy, self._totals)
        self._totals = None
        count = count.clamp(min=1)
        scale_gradients(trainer.strategy, optimizer, trainer.world_size / count)
        mean: Tensor = loss / count
        return mean


@dataclass(frozen=True)
class _Step:
    """An optimizer step with its number, epoch, last batch and loss (a scalar on the device)."""

    number: int
    epoch: int
    batch: int
    loss: Tensor


class FiniteLossCheck:
    """A check of the step losses since the last check, which waits for the device."""

    def __init__(self) -> None:
        self._recent: list[_Step] = []

    def add(self, trainer: L.Trainer, batch: int, loss: Tensor) -> None:
        """Record the loss of the coming step, whose last batch has the number `batch`."""
        self._recent.append(_Step(trainer.global_step, trainer.current_epoch, batch, loss))

    def check(self, trainer: L.Trainer, *, half: bool) -> None:
        """Check that the losses are finite.

        Args:
            trainer: Trainer of the run.
            half: Whether float16 is used, which overflows first.

        Raises:
            UserError: If a loss is not finite. The rows of its step are then in the run's folder.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return
        finite = torch.stack([step.loss for step in recent]).isfinite().tolist()
        if all(finite):
            return
        bad = recent[finite.index(False)]
        loss = bad.loss.item()
        or_else = ", or use bfloat16 instead of float16" if half else ""
        raise UserError(
            f"the training loss is {loss} at step {bad.number}: lower optim.lr{or_else}."
            f"{_save_rows(trainer, bad, str(loss))}"
        )


def _save_rows(trainer: L.Trainer, step: _Step, loss: str) -> str:
    """Write the rows of a step into the run's folder, and return a sentence that names the file."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(getattr(data, "encoded", None), dict):
        return ""
    batches = range(step.batch - step.batch % trainer.accumulate_grad_batches, step.batch + 1)
    path = RunFolder(Path(trainer.default_root_dir)).bad_step
    if trainer.is_global_zero:
        content = {
            "step": step.number,
            "epoch": step.epoch,
            "batches": list(batches),
            "loss": loss,
            "rows": data.rows_trained_on(step.epoch, batches),  # type: ignore[union-attr]
        }
        atomic_write(path, json.dumps(content, indent=2, default=str) + "\n")
    return f" The rows of that step are in {path}."
