"""LoraModule, a LightningModule of a frozen language model with LoRA layers."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lora_lightning.config.monitor import direction_of
from lora_lightning.config.schema import ModelConfig, OptimConfig
from lora_lightning.lora import Adapter, LoraConfig
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import Task, build_task

from .adapter_module import AdapterModule
from .build import build_adapted_model, find_shards
from .checkpoint_hooks import add_origin, check_fits, checked_copy, restore_task
from .fit_guard import FitGuard
from .fit_start import check_packed_rows, prepare_fit, report_doubts
from .lightning_internals import attached_trainer, restore_loaders
from .optim import (
    BY_METRIC,
    build_optimizer,
    build_scheduler,
    check_schedule_metric,
    step_by_metric,
)
from .stage_metrics import StageMetrics, check_monitor
from .step_loss import FiniteLossCheck, StepLoss, task_loss
from .trainer import planned_steps
from .warm_start import values_of

if TYPE_CHECKING:
    from typing_extensions import Self

UNLOGGED = 50
"""Steps between loss checks in a run that logs no losses (trainer.log_every_n_steps=0)."""
Batch = dict[str, Any] | list[dict[str, Any]]
"""A whole batch or its micro-batches (data.max_tokens)."""


class LoraModule(AdapterModule):
    """A frozen base model, a LoRA adapter on it, and a task to learn.

    The optimizer and the checkpoints hold only the adapter.

    The loss of an optimizer step is the mean over all targets of that step, across micro-batches
    and ranks. This also holds for a short last accumulation window. Gradients of the summed loss
    are accumulated and divided by the number of targets before clipping.

    Randomness within a step (dropout) is a function of seed, epoch, batch and rank. A resumed run
    therefore repeats an uninterrupted one without any stored generator state.

    Args:
        task: Task settings, or the Task object that the data module shares.
        model: Settings of the base model. Defaults to ModelConfig().
        lora: Settings of the adapter. Defaults to None, which trains the whole model (full
            fine-tuning, the baseline).
        optim: Settings of optimizer and schedule. Defaults to OptimConfig().
        seed: Seed of initialization and dropout. Defaults to 0.
        tokenizer: Tokenizer of the base model. Defaults to None, which loads it with the model.
        start_from: Adapter folder or run checkpoint (.ckpt) of the same shape, for a warm start.
            Defaults to None.
        task_state: State that the task learned from its data, as stored in checkpoints. Defaults
            to None, where the data module makes the task learn it.
        data: Data module for data-dependent initialization (EVA). Defaults to None, which selects
            the Trainer's.
    """

    def __init__(
        self,
        task: Task | dict[str, Any],
        model: ModelConfig | dict[str, Any] | None = None,
        lora: LoraConfig | dict[str, Any] | None = None,
        optim: OptimConfig | dict[str, Any] | None = None,
        *,
        seed: int = 0,
        tokenizer: Any = None,
        start_from: str | None = None,
        task_state: dict[str, Any] | None = None,
        data: Any = None,
    ) -> None:
        super().__init__()
        self.task = build_task(task) if isinstance(task, dict) else task
        if task_state is not None:
            restore_task(self.task, task_state)
        model, optim = model or {}, optim or {}
        self.model_config = ModelConfig(**model) if isinstance(model, dict) else model
        self.lora_config = LoraConfig(**lora) if isinstance(lora, dict) else lora
        self.optim_config = OptimConfig(**optim) if isinstance(optim, dict) else optim
        self.seed = seed
        self.tokenizer = tokenizer
        self.start_from = start_from
        self.data = data
        # Store plain values only, because weights_only=True cannot load anything else.
        self.save_hyperparameters(
            {
                "task": asdict(self.task.config),
                "model": asdict(self.model_config),
                "lora": None if self.lora_config is None else asdict(self.lora_config),
                "optim": asdict(self.optim_config),
                "seed": seed,
            },
            logger=False,
        )
        self.stop_signals: Any = None
        """The run's StopSignals, or None."""
        self.logs_validation = True
        """Whether loggers receive validation metrics."""
        self._step_loss = StepLoss()
        self._finite = FiniteLossCheck()
        self._batch = 0

    # Building --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base model and attach the adapter, unless this was done before."""
        if self.is_built:
            return
        trainer = attached_trainer(self)
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model_config)
        self.shards = find_shards(trainer, self.device_mesh, full=self.lora_config is None)
        self.take_over(
            build_adapted_model(
                self.task,
                self.model_config,
                self.lora_config,
                self.tokenizer,
                seed=self.seed,
                start_from=self.start_from,
                shards=self.shards,
                trainer=trainer,
                data=self.data,
            )
        )
        if self.start_from is not None and self.start_from.endswith(".ckpt"):
            self.load_state_dict(values_of(self.start_from, self.model_config, self.lora_config))
        check_monitor(self.task, self.val_metrics.metrics)

    def adopt(self, model: nn.Module, adapter: Adapter | None) -> None:
        """Set the model and its adapter, and the metrics of its task."""
        super().adopt(model, adapter)
        self.val_metrics = StageMetrics(self.task)
        self.test_metrics = StageMetrics(self.task)

    # Training --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        prepare_fit(self)

    def on_train_start(self) -> None:
        restore_loaders(self.trainer)
        check_schedule_metric(self.optim_config, validates=any(self.trainer.num_val_batches))
        self._guard = FitGuard(self)
        report_doubts(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx
        index = self.current_epoch * 1_000_000_007 + batch_idx
        rank = self.global_rank if self.shards is None else self.shards.data_rank
        torch.manual_seed((self.seed * 1_000_003 + index) * 4096 + rank)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if isinstance(batch, list):
            return [self.task.locate(part) for part in batch]
        return self.task.locate(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        *before, last = _micro_batches(batch)
        for part in before:
            # DDP's hooks are inactive within its forward. The backward pass of the last micro-batch
            # reduces the whole sum.
            self.trainer.strategy.backward(self.training_loss(part), None)
        # Lightning divides by the number of batches of a step, and DDP by the number of ranks. This
        # line and StepLoss.finish, which knows the true count, undo both.
        return self.training_loss(last) * self.trainer.accumulate_grad_batches

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss of a batch, and add it to the totals of its step."""
        offload = self.model_config.offload_activations
        output = task_loss(self.task, self.model, batch, self.device, offload=offload)
        self._step_loss.add(output)
        return output.total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._guard.check_step()
        if self.placement is not None:
            self.placement.average_gradients(p for p in self.parameters() if p.requires_grad)
        mean = self._step_loss.finish(self.trainer, optimizer)
        bar = self.trainer.progress_bar_callback
        self.log("train/loss", mean, prog_bar=not getattr(bar, "reads_loss", bar is None))
        self._finite.add(self.trainer, self._batch, mean)
        every = self.trainer.log_every_n_steps or UNLOGGED  # type: ignore[attr-defined]
        if self.global_step % every == 0:
            self._check_losses()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Do nothing, because Lightning calls this after the first micro-batches' backward."""

    def on_train_end(self) -> None:
        self._check_losses()
        self._guard.report_unreached()

    def _check_losses(self) -> None:
        half = self.trainer.precision == "16-mixed" or self.model_config.dtype == "float16"
        self._finite.check(self.trainer, half=half)

    # Validation, test, prediction ------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metrics.update(self.model, _micro_batches(batch))

    def on_validation_epoch_end(self) -> None:
        values, monitor = self._log_metrics("val", self.val_metrics), self.task.config.monitor
        trains = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if trains and self.optim_config.scheduler in BY_METRIC:
            step_by_metric(self.lr_schedulers(), self.optim_config, values, monitor)

    def on_test_start(self) -> None:
        check_packed_rows(self)
        report_doubts(self.trainer)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_metrics.update(self.model, _micro_batches(batch))

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return readable predictions for the rows of a batch, by micro-batch."""
        parts = _micro_batches(batch)
        return [row for part in parts for row in self.task.predict(self.model, part)]

    def _log_metrics(self, stage: str, metrics: StageMetrics) -> dict[str, Any]:
        signals = self.stop_signals
        self.task.stop_requested = None if signals is None else signals.check_for(self.shards)
        with self.trainer.precision_plugin.forward_context():
            metrics.finish(self.model)
        if signals is not None:
            signals.raise_if_requested(self.trainer)
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        on_bar = {"val/loss", self.task.config.monitor, f"val/{self.task.headline}"}
        logs = stage != "val" or self.logs_validation
        for name, value in values.items():
            # None means true, without Lightning's warning where there is no logger (evaluate).
            self.log(name, value, prog_bar=name in on_bar, logger=None if logs else False)
        return values

    # Optimizer -------------------------------------------------------------------------------

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer over all trainable parameters."""
        from_zero = [] if self.adapter is None else self.adapter.zero_initialized()
        scaled = attached_trainer(self) is not None and self.trainer.precision == "16-mixed"
        return build_optimizer(
            self.named_parameters(), self.optim_config, from_zero=from_zero, scaled=scaled
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        config, steps = self.optim_config, planned_steps(self.trainer)
        if getattr(self.trainer, "fast_dev_run", False) and config.warmup > 1:
            config = replace(config, warmup=0.0)  # the run takes only about one step
        mode = direction_of(self.task.config.monitor, self.task.config.mode)
        scheduler = build_scheduler(optimizer, config, steps, mode=mode)
        schedule = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule, unless it depends on a metric.

        Schedules that depend on a metric step in each validation. Lightning would skip that step in
        the first epoch of a resumed run.
        """
        if self.optim_config.scheduler not in BY_METRIC:
            scheduler.step()

    # Checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_losses()  # before a good checkpoint is overwritten
        if self.adapter is not None:
            self.adapter.check_frozen()
        add_origin(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(checkpoint, self)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **changes: Any
    ) -> Self:
        """Build a module from a possibly untrusted checkpoint, and load its values.

        Settings from the file get the same checks as those beside an adapter. They cannot set
        `trust_remote_code`. Arguments of this call can, as in
        `model={"trust_remote_code": True}`.

        Args:
            checkpoint_path: Path of the .ckpt file.
            map_location: Device of the module. Defaults to "cpu".
            changes: Further arguments of Lightning's method and of the class. A dict changes the
                settings that it names, and an object replaces them.

        Raises:
            UserError: If the file is damaged, or holds settings that a run does not write.
        """
        file, settings = checked_copy(checkpoint_path, cls, LoraModule, typed=changes)
        return super().load_from_checkpoint(file, map_location, **settings)


def _micro_batches(batch: Batch) -> list[dict[str, Any]]:
    return batch if isinstance(batch, list) else [batch]
