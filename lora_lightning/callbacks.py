"""Callbacks: what a run saves and shows beside its scalars."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    RichModelSummary,
    RichProgressBar,
)
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor

from .checkpoint import check_written
from .lora import UserError
from .module import LoraModule
from .signals import Stopped, StopSignals
from .strategies import data_ranks


class Paused(Exception):
    """A run has saved its state at a rung of successive halving and goes no further now.

    Args:
        rung: share of all steps that was asked for, step, planned steps, and name and value of the
            monitored metric there.
    """

    def __init__(self, rung: dict[str, Any]) -> None:
        super().__init__(f"paused at step {rung['step']} of {rung['planned']}")
        self.rung = rung


def _steps_between_validations(trainer: L.Trainer) -> float:
    """Optimizer steps from one validation to the next."""
    count, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    between = float(trainer.val_check_batch or math.inf)
    if trainer.check_val_every_n_epoch is None:  # counted over all epochs
        return between / count
    if between < batches:
        return between / count
    return math.ceil(batches / count) * trainer.check_val_every_n_epoch


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which a killed run goes on exactly.

    It is written every so many optimizer steps and after every epoch, at points where no gradient
    is half accumulated and no other callback has yet to see a validation. Writing is atomic: a
    kill in mid-write leaves the previous one.

    Args:
        folder: where last.ckpt goes.
        every_n_steps: optimizer steps between two writes.
    """

    def __init__(self, folder: str, every_n_steps: int = 50) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.pause_at: tuple[float, str] | None = None
        """Share of all steps, and a metric: at the validation nearest to it, the run pauses."""
        self.rungs: list[float] = []
        """Shares of all steps of all rungs, this one and others."""
        self.signals: StopSignals | None = None
        """Tells when the run is to save and end."""
        self._told = 0
        self._rung: dict[str, Any] | None = None
        self._saved_at = self._validated_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = self._validated_at = trainer.global_step
        if self.pause_at is None:
            return
        share, planned = self.pause_at[0], int(trainer.estimated_stepping_batches)
        if share * planned < 1:
            raise UserError(
                f"launcher.halving: a rung at {share:.3g} of {planned} optimizer steps is less "
                "than one step. Give fewer rungs, a smaller eta, or a larger min_resource."
            )
        interval = _steps_between_validations(trainer)
        at = [interval * max(1, math.ceil(rung * planned / interval - 0.5)) for rung in self.rungs]
        if len({*at, planned}) <= len(at) or (at and max(at) >= planned):
            raise UserError(
                f"launcher.halving: rungs at {', '.join(f'{rung:.3g}' for rung in self.rungs)} of "
                f"{planned} optimizer steps need a validation each, before the last step, and "
                f"there is one every {interval:g} steps. Validate more often, "
                "trainer.val_check_interval=0.5 or less, or give fewer rungs."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.pause_at is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        share, metric = self.pause_at
        planned = int(trainer.estimated_stepping_batches)
        interval = trainer.global_step - self._validated_at
        self._validated_at = trainer.global_step
        near = trainer.global_step >= share * planned - interval / 2
        if near and metric in trainer.callback_metrics:
            self._rung = {
                "share": share,
                "step": trainer.global_step,
                "planned": planned,
                "monitor": metric,
                "value": float(trainer.callback_metrics[metric]),
                "loss": float(trainer.callback_metrics.get("val/loss", math.inf)),
            }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        self._told = 0 if self.signals is None else self.signals.agreed()
        due = trainer.global_step - self._saved_at >= self.every_n_steps or self._rung is not None
        if not (due or self._told) or loop._should_accumulate():
            return
        # Lightning does not make up for a validation or an epoch's end that was due here.
        fetcher = trainer.fit_loop._data_fetcher
        if loop._is_training_done or loop._should_check_val_fx(fetcher):  # type: ignore[arg-type]
            return
        self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Under max_steps Lightning would run an epoch's end a second time, and it does not store
        # that a run was told to stop: there the checkpoint in mid-epoch has to do.
        if trainer.max_steps == -1 and not trainer.should_stop:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved_at = trainer.global_step
        for logger in trainer.loggers:  # what the checkpoint knows of will not be logged again
            logger.save()
        # Lightning writes through the folder for temporary files, from which a move may be a copy.
        beside = self.path.with_name(f".{self.path.name}")
        try:
            trainer.save_checkpoint(beside, weights_only=False)
            if trainer.is_global_zero:
                check_written(beside, trainer.lightning_module.state_dict())
                os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {self.path}: {error}. The checkpoint before it is whole: free some "
                "space and go on with resume=."
            ) from None
        if self._rung is not None:
            raise Paused(self._rung)
        if self._told:
            raise Stopped(self._told)


class ProgressBar(RichProgressBar):
    """Lightning's, which also says which model a validation or test is of.

    The loss that it shows is read at most twice a second, since reading waits for the device.
    """

    READ_EVERY = 0.5
    """Seconds."""
    _read_at = -math.inf

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        shown = self._metric_component
        if time.monotonic() - self._read_at < self.READ_EVERY:
            self._metric_component = None  # the bar moves on, what stands beside it stays
        else:
            self._read_at = time.monotonic()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, i)
        self._metric_component = shown

    @property
    def validation_description(self) -> str:
        """Text before the bar of a validation."""
        best = self.trainer.state.fn == "validate"
        return "Validation of the best" if best else "Validation"

    @property
    def test_description(self) -> str:
        """Text before the bar of a test."""
        return "Test of the best" if self.trainer.global_step else "Test before training"


class AdapterSummary(RichModelSummary):
    """Shows what the adapter covers; for a model without one, Lightning's own summary."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        adapter = pl_module.adapter if isinstance(pl_module, LoraModule) else None
        if adapter is None:
            super().on_fit_start(trainer, pl_module)
        elif trainer.is_global_zero:
            told = str(adapter.summary())
            Console().print(told, highlight=False, markup=False, soft_wrap=True)


class UpdateNorms(Callback):
    """Logs the Frobenius norm of each adapted layer's update s B A after every validation."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        adapter = pl_module.adapter if isinstance(pl_module, LoraModule) else None
        if adapter is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        norms = {
            f"update_norm/{name}": layer.update_norm() for name, layer in adapter.layers.items()
        }
        values = {name: norm.item() for name, norm in norms.items()}
        values["update_norm/total"] = sum(value**2 for value in values.values()) ** 0.5
        # The step that Lightning logs this validation's metrics at.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


class SamplePredictions(Callback):
    """Shows predictions on the same few validation rows, after every validation.

    They are a table in TensorBoard's text tab, and lines of `samples.jsonl`.

    Args:
        count: number of rows.
        folder: where samples.jsonl goes; None: there is none.
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
        predictions = _predict(pl_module, data, rows)  # of a base in shares, by all processes
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
        """Appends samples of a step; a resumed run takes back those of steps it repeats."""
        kept: list[str] = []
        if path.is_file():
            old = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in old if json.loads(line)["step"] < step]
        new = [json.dumps({"step": step, **sample}, ensure_ascii=False) for sample in samples]
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("\n".join([*kept, *new]) + "\n", encoding="utf-8")
        os.replace(temporary, path)


class RunClock(Callback):
    """Measures a run: seconds of training, tokens trained on, peak memory.

    `tokens` counts positions that the attention mask admits, without padding, over all ranks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._counted = torch.zeros((), dtype=torch.long)  # on this rank, not yet in `tokens`
        self._trainer: L.Trainer | None = None
        self._started: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        self._counted = self._counted.to(pl_module.device)
        self._trainer = trainer
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._counted += _batch_counts(batch)[1]  # on the device: nothing waits for it

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._started is None:
            return
        self.seconds += time.monotonic() - self._started
        self._started = None
        self.tokens += self._over_ranks(trainer)
        self._counted = torch.zeros_like(self._counted)
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._started is None else time.monotonic() - self._started
        # Lightning asks all ranks, and stores what rank 0 says.
        counted = 0 if self._trainer is None else self._over_ranks(self._trainer)
        return {"seconds": self.seconds + running, "tokens": self.tokens + counted}

    def _over_ranks(self, trainer: L.Trainer) -> int:
        """Tokens not yet in `tokens`; every rank has to ask."""
        counted = int(trainer.strategy.reduce(self._counted.clone(), reduce_op="sum"))  # in place
        return counted * data_ranks(trainer) // trainer.world_size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]


class Throughput(Callback):
    """Logs rows and tokens (without padding) trained on per second, over all ranks.

    What is counted stays on the device between two loggings, every `log_every_n_steps` of the
    Trainer and at the end. The time of validations is left out.
    """

    def __init__(self) -> None:
        self._counted = torch.zeros(2, dtype=torch.long)
        self._since = self._stopped = 0.0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counted = torch.zeros(2, dtype=torch.long, device=pl_module.device)
        self._since, self._step = time.monotonic(), trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stopped = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.monotonic() - self._stopped

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self._counted += _batch_counts(batch)
        if trainer.global_step - self._step >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._log(trainer)
            self._begin(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._step:
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        rows, tokens = (self._counted * data_ranks(trainer)).tolist()  # waits for the device
        seconds = time.monotonic() - self._since
        rates = {
            "throughput/rows_per_second": rows / seconds,
            "throughput/tokens_per_second": tokens / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=trainer.global_step)


def _batch_counts(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> Tensor:
    """Rows of a batch and its tokens without padding, (2), on the batch's device."""
    if isinstance(batch, list):
        return torch.stack([_batch_counts(part) for part in batch]).sum(0)
    if "filled" in batch:  # packed: a row begins at each position 0
        filled = batch["filled"] == 1
        return torch.stack([((batch["position_ids"] == 0) & filled).sum(), filled.sum()])
    shown = batch["attention_mask"] == 1
    return torch.stack([shown.any(1).sum(), shown.sum()])


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def _spread(total: int, count: int) -> list[int]:
    """`count` indices spread evenly over `total`."""
    return [index * total // count for index in range(count)] if total > count else [*range(total)]


@torch.no_grad()
def _predict(module: LoraModule, data: Any, rows: list[int]) -> list[dict[str, Any]]:
    batch = data.collate()([dict(data.encoded["val"][row]) for row in rows])
    batch = {name: tensor.to(module.device) for name, tensor in batch.items()}
    was_training = module.training
    module.eval()
    predictions = module.predict_step(batch, 0)
    module.train(was_training)
    return predictions
