"""Callbacks that show progress, the adapter, norms of its updates, and sample predictions."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichModelSummary, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from lora_lightning.tasks import to_device
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.logs import read_samples, tell_damaged
from lora_lightning.utils.terminal import printable

from .heartbeat import Heartbeat
from .loggers import log_after


class ProgressBar(RichProgressBar):
    """Lightning's progress bar, which also names the model of a validation or test.

    It reads the training loss itself, at most twice a second, since reading waits for the device.
    Lightning would read values logged for a bar after every batch. Without a terminal, as in the
    log of a job, it prints a progress line now and then.
    """

    READ_EVERY = 0.5
    """Seconds between two reads of the loss."""
    LINE_EVERY = 25.0
    """Seconds between two progress lines."""
    reads_loss = True
    """Whether the bar reads the training loss. The module then does not log it for the bar."""
    _read_at = -math.inf
    _line_at = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        shown = self._metric_component
        if time.monotonic() - self._read_at < self.READ_EVERY:
            self._metric_component = None  # the bar advances, the metrics beside it stay
        else:
            self._read_at = time.monotonic()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, i)
        self._metric_component = shown
        if self._console is not None and not self._console.is_terminal:
            self._tell(trainer)

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches of this epoch, within the limit of `trainer.max_steps`."""
        trainer, total = self.trainer, super().total_train_batches
        if trainer.max_steps < 0:
            return total
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(total, left + (done if done < total else 0))  # not reset yet at an epoch's end

    def _get_train_description(self, current_epoch: int) -> str:
        most = self.trainer.max_epochs or 0
        return f"Epoch {current_epoch + 1}{f'/{most}' if most > 0 else ''}"

    def get_metrics(self, trainer: L.Trainer, model: L.LightningModule) -> Any:
        """Return the metrics beside the bar."""
        loss = trainer.callback_metrics.get("train/loss")
        own = {} if loss is None else {"train/loss": loss.item()}
        return {**own, **super().get_metrics(trainer, model)}

    def _tell(self, trainer: L.Trainer) -> None:
        now = time.monotonic()
        self._line_at = self._line_at or now
        if now - self._line_at < self.LINE_EVERY:
            return
        self._line_at = Heartbeat.said = now
        loss = trainer.callback_metrics.get("train/loss")
        print(
            f"epoch {trainer.current_epoch + 1}, step {trainer.global_step} of "
            f"{trainer.estimated_stepping_batches:.0f}"
            f"{'' if loss is None else f', train/loss {loss:.4f}'}",
            flush=True,
        )

    @property
    def validation_description(self) -> str:
        """Text before the bar of a validation."""
        return f"Validation{self._of_the_best if self.trainer.state.fn == 'validate' else ''}"

    @property
    def test_description(self) -> str:
        """Text before the bar of a test."""
        return f"Test{self._of_the_best}" if self.trainer.global_step else "Test before training"

    @property
    def _of_the_best(self) -> str:
        callbacks = self.trainer.checkpoint_callbacks
        return (
            " of the best" if any(getattr(one, "best_model_path", "") for one in callbacks) else ""
        )


class AdapterSummary(RichModelSummary):
    """A summary of what the adapter covers, or Lightning's own for a model without an adapter."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, LoraModule) or pl_module.adapter is None:
            super().on_fit_start(trainer, pl_module)
            return
        with pl_module.whole_adapter():
            summary = str(pl_module.adapter.summary())
        if trainer.is_global_zero:
            console = Console(markup=False, emoji=False, highlight=False)
            console.print(printable(summary), soft_wrap=True)


class UpdateNorms(Callback):
    """A callback that logs the Frobenius norm of the whole update s B A after every validation.

    Args:
        layers: Whether to also log a curve of the norm for each adapted layer. Defaults to False.
    """

    def __init__(self, layers: bool = False) -> None:
        self.layers = layers

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, LoraModule) or pl_module.adapter is None:
            return
        if trainer.sanity_checking:
            return
        layers = pl_module.adapter.layers
        with pl_module.whole_adapter():
            norms = {f"update_norm/{name}": layer.update_norm() for name, layer in layers.items()}
        if not trainer.is_global_zero:
            return
        values = {name: norm.item() for name, norm in norms.items()}
        total = sum(value**2 for value in values.values()) ** 0.5
        by_layer = values if self.layers else {}
        log_after(trainer, {**by_layer, "update_norm/total": total}, trainer.global_step)


class SamplePredictions(Callback):
    """A callback that shows predictions on the same few validation rows after every validation.

    They appear as a table in TensorBoard's text tab, and as lines of `samples.jsonl`.

    Args:
        count: Number of rows. Defaults to 8.
        folder: Folder of samples.jsonl. Defaults to None, which writes no file.
    """

    def __init__(self, count: int = 8, folder: str | None = None) -> None:
        self.count = count
        self.file = None if folder is None else Path(folder) / "samples.jsonl"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        loggers = [log for log in trainer.loggers if isinstance(log, TensorBoardLogger)]
        assert isinstance(pl_module, LoraModule)
        idle = not trainer.is_global_zero and pl_module.shards is None
        if trainer.sanity_checking or idle or not (loggers or self.file):
            return
        rows = _spread(len(data.encoded["val"]), self.count)
        predictions = _predict(pl_module, data, rows)  # on all ranks if the base is sharded
        if not trainer.is_global_zero:
            return
        samples = [
            {
                **data.task.describe(data.raw["val"][row]),
                "prediction": data.task.show_prediction(prediction),
            }
            for row, prediction in zip(rows, predictions, strict=True)
        ]
        lines = ["| input | target | prediction |", "|---|---|---|"]
        lines += [f"| {' | '.join(map(_cell, sample.values()))} |" for sample in samples]
        for logger in loggers:
            logger.experiment.add_text(
                "samples/val", "\n".join(lines), global_step=trainer.global_step
            )
        if self.file is not None:
            self._write(self.file, trainer.global_step, samples)

    @staticmethod
    def _write(path: Path, step: int, samples: list[dict[str, str]]) -> None:
        """Append the samples of a step, and drop samples of steps that a resumed run repeats."""
        old, damaged = read_samples(path)
        tell_damaged(path, damaged)
        earlier = [row for row in old if row["step"] < step]
        new = [{"step": step, **sample} for sample in samples]
        lines = [json.dumps(row, ensure_ascii=False) for row in [*earlier, *new]]
        atomic_write(path, "".join(f"{printable(line, json=True)}\n" for line in lines))


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def _spread(total: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over `total`."""
    return [index * total // count for index in range(count)] if total > count else [*range(total)]


@torch.no_grad()
def _predict(module: LoraModule, data: Any, rows: list[int]) -> list[dict[str, Any]]:
    batch = data.collate()([dict(data.encoded["val"][row]) for row in rows])
    was_training = module.training
    module.eval()
    predictions = module.predict_step(to_device(batch, module.device), 0)
    module.train(was_training)
    return predictions
