"""Metrics of a validation or a test, collected over its batches."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchmetrics import MetricCollection

from lora_lightning.config.schema import direction_of, refuse_direction
from lora_lightning.lora import UserError
from lora_lightning.tasks import Task
from lora_lightning.tasks.metrics import MeanLoss


class StageMetrics(nn.Module):
    """The task's metrics and the mean loss of a validation or a test.

    Args:
        task: Task that knows its labels.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.metrics = task.metrics()
        self.loss = MeanLoss()
        self._collected: list[Any] = []
        """Items that the task measures after the last batch."""
        self._largest_batch = 0
        """Rows of the largest batch."""

    def update(self, model: nn.Module, micro_batches: list[dict[str, Any]]) -> None:
        """Add the micro-batches of a batch."""
        for batch in micro_batches:
            output = self.task.loss(model, batch)
            self.task.update_metrics(self.metrics, model, batch, output)
            self.loss.update(output.total, output.count)
            self._collected += self.task.collect(batch)
        rows = sum(len(batch["input_ids"]) for batch in micro_batches)
        self._largest_batch = max(self._largest_batch, rows)

    def finish(self, model: nn.Module) -> None:
        """Let the task measure the collected items, such as texts to generate."""
        self.task.finish_epoch(self.metrics, model, self._collected, self._largest_batch)

    def compute(self) -> dict[str, Any]:
        """Return the loss and the metrics by name, and start over."""
        values = {**self.metrics.compute()}
        values = {"loss": self.loss.compute(), **values}
        self.metrics.reset()
        self.loss.reset()
        self._collected, self._largest_batch = [], 0
        return values


def check_monitor(task: Task, metrics: MetricCollection) -> None:
    """Raise UserError if the metrics do not measure `task.monitor`, or its mode contradicts it."""
    monitor, mode = task.config.monitor, task.config.mode
    known = ["val/loss", *(f"val/{name}" for name in task.metric_names())]
    if monitor not in known:
        raise UserError(
            f"task.monitor={monitor}: not measured by this task. Known: {', '.join(known)}."
        )
    chosen = direction_of(monitor, mode)
    for name, metric in metrics.items(keep_base=True, copy_state=False):
        higher = metric.higher_is_better
        if monitor == f"val/{name}" and higher not in (None, chosen == "max"):
            if mode is not None:
                refuse_direction(monitor, mode)
            raise UserError(
                f"task.monitor={monitor}: {'higher' if higher else 'lower'} is better, which the "
                f"name does not say. Set task.mode={'max' if higher else 'min'}."
            )
