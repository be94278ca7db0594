"""LoraModule, a LightningModule of a frozen language model with LoRA layers."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lora_lightning.config.compatibility import refuse_combinations
from lora_lightning.config.schema import (
    ModelConfig,
    OptimConfig,
    direction_of,
    refuse_direction,
)
from lora_lightning.config.untrusted import arguments_from_file
from lora_lightning.distributed.adapter_sharding import Placement, place_adapter
from lora_lightning.distributed.sharded_loading import (
    Shards,
    broadcast,
    local_rank_in_environment,
    same_everywhere,
)
from lora_lightning.distributed.strategies import (
    ShardedStrategy,
    data_ranks,
    refuse_full,
    refuse_strategy,
    scale_gradients,
    sum_over_ranks,
)
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.functional import joins_products
from lora_lightning.lora.initialization.eva import Start
from lora_lightning.lora.initialization.loftq import make_up
from lora_lightning.lora.layers.trainable_tokens import rows_of_tokens
from lora_lightning.lora.rng import fork_rng
from lora_lightning.lora.running_statistics import checksums, refuse_moved
from lora_lightning.lora.serialization.validation import check_tensors
from lora_lightning.lora.summary import count
from lora_lightning.models.forward import (
    check_packing,
    compile_layers,
    masks_without_waiting,
    run_once,
)
from lora_lightning.models.loading import fingerprint, load_tokenizer
from lora_lightning.models.offload import offloaded_activations
from lora_lightning.models.quantization import experts_left
from lora_lightning.models.tokenizer import token_ids
from lora_lightning.tasks import Task, build_task
from lora_lightning.tasks.metrics import MeanLoss
from lora_lightning.utils.terminal import say

from .callbacks.loss_guard import StepLosses
from .checkpointing import check_optimizer, read_checkpoint
from .data_init import found_before, look
from .optim import (
    BY_METRIC,
    build_optimizer,
    build_scheduler,
    keep_implementation,
    refuse_unmeasured,
)
from .warm_start import load_values, values_of

if TYPE_CHECKING:
    from typing_extensions import Self

RANKS, ROWS = "data_ranks", "rows"
"""Checkpoint keys. The first stores the number of ranks that see different rows."""
UNLOGGED = 50
"""Steps between loss checks in a run that logs no losses (trainer.log_every_n_steps=0)."""
Batch = dict[str, Any] | list[dict[str, Any]]
"""A whole batch or its micro-batches (data.max_tokens)."""


class LoraModule(L.LightningModule):
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
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold only the adapter, load_state_dict checks it
        self.task = build_task(task) if isinstance(task, dict) else task
        if task_state is not None:
            try:
                self.task.restore(task_state)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"task_state is not that of task={self.task.name}: {error!r}. Use the "
                    "checkpoint as its run has written it."
                ) from None
        self.model_config = (
            ModelConfig(**model) if isinstance(model, dict) else model or ModelConfig()
        )
        self.lora_config = LoraConfig(**lora) if isinstance(lora, dict) else lora
        self.optim_config = (
            OptimConfig(**optim) if isinstance(optim, dict) else optim or OptimConfig()
        )
        self.seed = seed
        self.tokenizer = tokenizer
        self.start_from = start_from
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
        self.stops: Any = None
        """The run's StopSignals, or None."""
        self.logs_validation = True
        """Whether loggers receive validation metrics."""
        self.model: nn.Module | None = None
        self.adapter: Adapter | None = None
        self.val_metrics: MetricCollection | None = None
        self.test_metrics: MetricCollection | None = None
        self.val_loss = MeanLoss()
        self.test_loss = MeanLoss()
        self.data: Any = None
        """Data module for data-dependent initialization. None selects the Trainer's."""
        self._from_data: LoraConfig | None = None
        """Adapter settings that result from data-dependent initialization."""
        self.shards: Shards | None = None
        """Processes that the base is sharded over, or None."""
        self.placement: Placement | None = None
        """The part of the adapter that this rank holds when the base is sharded."""
        self._totals: Tensor | None = None
        """Summed loss and number of targets of the micro-batches since the last step, (2)."""
        self._batch = 0
        self._losses = StepLosses()
        self._collected: list[Any] = []
        """Items that the task measures at the end of a validation or test."""
        self._largest_batch = 0
        """Rows of the largest batch in that validation or test."""
        self._unreached: set[str] | None = None
        """Trainable tensors without a gradient in this fit so far. None means not yet known."""
        self._buffers_before: dict[str, float] = {}
        """Checksums of the base's buffers at the start of the fit."""
        self._frozen_in = -1
        """The last epoch in which the base was checked."""
        self.total_parameters = self.trained_parameters = 0
        """Sizes of the model, before a sharded strategy counts tied weights twice."""

    # Building --------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base model and attach the adapter, unless this was done before."""
        if self.model is not None:
            return
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model_config)
        self.shards = self._find_shards()
        if self.shards is not None and self.shards.tensor > 1 and self.model_config.compile:
            raise UserError(
                "model.compile: layers whose matrices are cut (tensor parallelism) cannot be "
                "compiled. Leave it out, or use trainer=fsdp2."
            )
        refuse_combinations(
            self.model_config,
            self.lora_config,
            start_from=self.start_from,
            in_shares=self.shards is not None,
        )
        with ExitStack() as stack:
            if self.shards is not None:
                stack.enter_context(local_rank_in_environment(self.trainer.local_rank))
            stack.enter_context(fork_rng(self._device_of_model()))
            torch.manual_seed(self.seed)
            model, whole = self.task.build_model(self.model_config, self.tokenizer, self.shards)
            adapter = None
            if self.lora_config is not None:
                adapter = self._put_on(model, self.lora_config, whole)
                if self.start_from is not None and not self.start_from.endswith(".ckpt"):
                    load_values(adapter, self.start_from)
        self.total_parameters = count(model.parameters())
        self.trained_parameters = count(p for p in model.parameters() if p.requires_grad)
        if adapter is not None and self.shards is not None:
            self.placement = place_adapter(adapter, self.shards)
        if self.model_config.gradient_checkpointing:
            # Checkpointed blocks get no gradient unless the frozen embedding's output needs one.
            model.enable_input_require_grads()  # type: ignore[operator]
        if self.model_config.compile is not None:
            compile_layers(model)
        self.adopt(model, adapter)
        if self.start_from is not None and self.start_from.endswith(".ckpt"):
            self.load_state_dict(values_of(self.start_from, self.model_config, self.lora_config))
        self._check_monitor()

    def _device_of_model(self) -> torch.device:
        """Return the device to build the model on. A Trainer sets its device beforehand."""
        trainer = self._trainer
        return torch.get_default_device() if trainer is None else trainer.strategy.root_device

    def _put_on(self, model: nn.Module, config: LoraConfig, whole: list[str]) -> Adapter:
        """Attach the adapter to a model, and train the modules in `whole` in full."""
        saved = list(dict.fromkeys([*config.modules_to_save, *whole]))
        rows = config.trainable_token_indices
        new = self.model_config.new_tokens
        if new:
            rows = rows_of_tokens(model, token_ids(self.tokenizer, new))
        full = replace(config, modules_to_save=saved, trainable_token_indices=rows)
        matrices: dict[str, Tensor] = {}
        if config.init == "eva":
            start = self._look_at_data(model, full)
            full, matrices = start.config, start.matrices
            self._from_data = replace(
                full,
                modules_to_save=config.modules_to_save,
                trainable_token_indices=config.trainable_token_indices,
            )
        elif config.init == "loftq":
            full = replace(full, init="kaiming")  # for layers that are not quantized
        adapter = Adapter(model, full)
        adapter.start_at(matrices)
        if config.init == "loftq" and not self._goes_on():
            original = replace(self.model_config, quantization=None)
            with torch.device("cpu"):  # there is no room for it beside the quantized model
                make_up(adapter, self.task.build_model(original, self.tokenizer)[0])
        for layer in adapter.token_rows.values() if new else ():
            layer.start_at_mean()
        return adapter

    def _look_at_data(self, model: nn.Module, config: LoraConfig) -> Start:
        """Return EVA's result, or the earlier one of a resumed run or a warm start."""
        if earlier := self._goes_on():
            return Start(found_before(earlier, config), {})
        trainer, data = self._trainer, self.data
        if trainer is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return look(self.task, model, config, data, device)
        strategy = trainer.strategy
        data = data or getattr(trainer, "datamodule", None)
        shows = trainer.is_global_zero
        found = look(self.task, model, config, data, strategy.root_device, shows=shows)
        broadcast_found: Start = strategy.broadcast(found)  # the last bits may differ by device
        return broadcast_found

    def _goes_on(self) -> str:
        """Return the checkpoint or adapter that replaces the initial values, or an empty string."""
        return self.start_from or str((self._trainer and self._trainer.ckpt_path) or "")

    def _find_shards(self) -> Shards | None:
        """Return the processes of a ShardedStrategy, or None."""
        if self._trainer is not None:
            refuse_strategy(type(self.trainer.strategy).__name__)
        if self.device_mesh is None:
            return None
        if not isinstance(self.trainer.strategy, ShardedStrategy):
            raise UserError(
                f"a {type(self.trainer.strategy).__name__} would not know which gradients to "
                "average: use lora_lightning.strategies.ShardedStrategy, or trainer=fsdp2."
            )
        refuse_full(self.trainer.strategy, full=self.lora_config is None)
        return Shards(self.device_mesh)

    def adopt(self, model: nn.Module, adapter: Adapter | None) -> None:
        """Take over a built model and its adapter."""
        self.model, self.adapter = model, adapter
        self.val_metrics = self.task.metrics()
        self.test_metrics = self.task.metrics()

    def _check_monitor(self) -> None:
        monitor, mode = self.task.config.monitor, self.task.config.mode
        known = ["val/loss", *(f"val/{name}" for name in self.task.metric_names())]
        if monitor not in known:
            raise UserError(
                f"task.monitor={monitor} is not measured here. Known: {', '.join(known)}."
            )
        chosen = direction_of(monitor, mode)
        for name, metric in (self.val_metrics or self.task.metrics()).items(keep_base=True):
            higher = metric.higher_is_better
            if monitor == f"val/{name}" and higher not in (None, chosen == "max"):
                if mode is not None:
                    refuse_direction(monitor, mode)
                raise UserError(
                    f"of {monitor} {'higher' if higher else 'lower'} is better, which "
                    f"its name does not tell: type task.mode={'max' if higher else 'min'}."
                )

    def whole_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which a sharded adapter is whole on all ranks."""
        return nullcontext() if self.placement is None else self.placement.whole()

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the stored trainable tensors of the adapter or the whole model, by name."""
        if self.adapter is not None:
            return self.adapter.named_tensors()
        assert self.model is not None
        return self.model.state_dict(keep_vars=True)

    # Steps -----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._check_packing()
        self._check_types()
        if self.model_config.quantization is not None and self.trainer.is_global_zero:
            assert self.model is not None
            say(experts_left(self.model), end="", file=sys.stderr)
        if self.trainer.world_size > 1:
            with self.whole_adapter():
                broadcast(self.trainable_tensors().values())
            if self.shards is None:
                self._check_same_base()
        if self.adapter is not None and self.shards is None and joins_products(self.device):
            assert self.model is not None
            # One pass finds the layers with a common input, and later passes compute them together.
            # Without this pass, the first step of a resumed run computes differently.
            with self.trainer.precision_plugin.forward_context():
                run_once(self.model, encoder_decoder=getattr(self.task, "encoder_decoder", False))

    def _check_same_base(self) -> None:
        """Raise UserError if ranks have read different files, since the base is not broadcast."""
        frozen = ((n, p) for n, p in self.named_parameters() if not p.requires_grad)
        if not same_everywhere(int(fingerprint(frozen)[:15], 16), self.device):
            raise UserError(
                f"model.name_or_path={self.model_config.name_or_path}: the processes of this run "
                "have loaded different weights. Give all of them the same files."
            )

    def _check_types(self) -> None:
        for name, tensor in self.trainable_tensors().items():
            if tensor.requires_grad and tensor.dtype in (torch.bfloat16, torch.float16):
                raise UserError(
                    f"{name} is {tensor.dtype}, which would round away most updates; what is "
                    "trained must be fp32. A Trainer of your own takes precision='32-true', or "
                    "'bf16-mixed', and ModelConfig(dtype='bfloat16') makes the frozen weights bf16."
                )

    def on_test_start(self) -> None:
        self._check_packing()
        self._tell_doubts()

    def _tell_doubts(self) -> None:
        """Report doubts about the data.

        This waits until the model is ready too, so that an error in the model is reported alone.
        """
        tell = getattr(getattr(self.trainer, "datamodule", None), "tell_doubts", None)
        if tell is not None and self.trainer.is_global_zero:
            tell()

    def _check_packing(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and data.packs:
            assert self.model is not None
            with self.trainer.precision_plugin.forward_context():
                check_packing(self.model)

    def on_train_start(self) -> None:
        # configure_optimizers asks for the number of steps. For that, Lightning creates the data
        # loaders before it reads their saved state, and never restores that state.
        self.trainer.fit_loop._load_combined_loader_states()
        refuse_unmeasured(self.optim_config, validates=any(self.trainer.num_val_batches))
        self._unreached, self._frozen_in = None, -1
        if self.adapter is not None:
            self._buffers_before = self._checksums()
        self._tell_doubts()

    def on_train_end(self) -> None:
        self._check_losses()
        if self._unreached and self.trainer.is_global_zero:
            say(
                f"{len(self._unreached)} trained tensors never got a gradient, such as "
                f"{min(self._unreached)}: they are as they were before training.",
                file=sys.stderr,
            )

    def _checksums(self) -> dict[str, float]:
        assert self.model is not None
        return checksums(self.model, but=self.trainable_tensors().values())

    def _check_base(self) -> None:
        """Raise UserError if training changes a part of the base that no adapter stores."""
        if self.adapter is None:
            return
        if self._frozen_in != self.current_epoch:  # callbacks unfreeze at the start of an epoch
            self._frozen_in = self.current_epoch
            self.adapter.check_frozen()
        if self._unreached is None:
            refuse_moved(self._buffers_before, self._checksums())

    def _check_reach(self) -> None:
        """Find trainable tensors without a gradient in the first step.

        Later steps remove those that a gradient has reached. In full fine-tuning, the model may
        have parts that the task does not use.
        """
        if hasattr(self.trainer.strategy, "scale_gradients"):
            return  # DeepSpeed has removed the gradients
        if self._unreached is None:
            some = self._without_gradient()
            self._unreached = set(some)
            if some and self.trainer.is_global_zero:
                why = "it has no rows for them"
                why += ", or the task does not use them" if self.adapter is None else ""
                say(
                    f"the first step does not reach {len(some)} trained tensors, such as "
                    f"{some[0]}: {why}.",
                    file=sys.stderr,
                )
        elif self._unreached:
            trained = self.trainable_tensors()
            self._unreached -= {n for n in self._unreached if trained[n].grad is not None}

    def _without_gradient(self) -> list[str]:
        if self.adapter is not None:
            return self.adapter.check_gradients()
        trained = self.trainable_tensors()
        return [name for name, t in trained.items() if t.requires_grad and t.grad is None]

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
        *before, last = _parts(batch)
        for part in before:
            # DDP's hooks are inactive within its forward. The backward pass of the last micro-batch
            # reduces the whole sum.
            self.trainer.strategy.backward(self.training_loss(part), None)
        # Lightning divides by the number of batches of a step, and DDP by the number of ranks. This
        # line and on_before_optimizer_step, which knows the true count, undo both.
        return self.training_loss(last) * self.trainer.accumulate_grad_batches

    def training_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed loss of a batch, and add it to the totals of its step."""
        assert self.model is not None
        offloads = self.model_config.offload_activations
        offloaded = offloaded_activations(self.model) if offloads else nullcontext()
        with offloaded, masks_without_waiting(self.device):
            output = self.task.loss(self.model, batch)
        totals = torch.stack([output.total.detach().float(), output.count.detach().float()])
        self._totals = totals if self._totals is None else self._totals + totals
        return output.total

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Do nothing, because Lightning calls this after the first micro-batches' backward."""

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._check_base()
        self._check_reach()
        if self.placement is not None:
            self.placement.average_gradients(p for p in self.parameters() if p.requires_grad)
        totals, self._totals = self._totals, None
        assert totals is not None
        loss, count = sum_over_ranks(self.trainer.strategy, totals)
        count = count.clamp(min=1)
        scale_gradients(self.trainer.strategy, optimizer, self.trainer.world_size / count)
        mean = loss / count
        bar = self.trainer.progress_bar_callback
        self.log("train/loss", mean, prog_bar=not getattr(bar, "reads_loss", bar is None))
        self._losses.add(self.trainer, self._batch, mean)
        every = self.trainer.log_every_n_steps or UNLOGGED  # type: ignore[attr-defined]
        if self.global_step % every == 0:
            self._check_losses()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        placement = self.placement
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        if placement is None or not placement.cuts or not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        trained = self.trainer.precision_plugin.main_params(optimizer)
        placement.clip_by_norm(trained, float(gradient_clip_val))

    def _check_losses(self) -> None:
        half = self.trainer.precision == "16-mixed" or self.model_config.dtype == "float16"
        self._losses.check(self.trainer, half=half)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, self.test_loss)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return readable predictions for the rows of a batch, by micro-batch."""
        assert self.model is not None
        return [row for part in _parts(batch) for row in self.task.predict(self.model, part)]

    def _evaluate(
        self, batch: Batch, metrics: MetricCollection | None, mean_loss: MeanLoss
    ) -> None:
        assert self.model is not None
        assert metrics is not None
        parts = _parts(batch)
        for part in parts:
            output = self.task.loss(self.model, part)
            self.task.update_metrics(metrics, self.model, part, output)
            mean_loss.update(output.total, output.count)
            self._collected += self.task.collect(part)
        rows = sum(len(part["input_ids"]) for part in parts)
        self._largest_batch = max(self._largest_batch, rows)

    def on_validation_epoch_end(self) -> None:
        values = self._log_metrics("val", self.val_metrics, self.val_loss)
        trains = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if trains and self.optim_config.scheduler in BY_METRIC:
            self._step_by_metric(values)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics, self.test_loss)

    def _log_metrics(
        self, stage: str, metrics: MetricCollection | None, mean_loss: MeanLoss
    ) -> dict[str, Any]:
        assert self.model is not None
        assert metrics is not None
        self.task.is_told = self._is_told()
        with self.trainer.precision_plugin.forward_context():
            self.task.finish_epoch(metrics, self.model, self._collected, self._largest_batch)
        if self.stops is not None:
            self.stops.raise_if_told(self.trainer)
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        values = {f"{stage}/loss": mean_loss.compute(), **values}
        shown = {"val/loss", self.task.config.monitor, f"val/{self.task.headline}"}
        logs = stage != "val" or self.logs_validation
        for name, value in values.items():
            # None means true, without Lightning's warning where there is no logger (evaluate).
            self.log(name, value, prog_bar=name in shown, logger=None if logs else False)
        metrics.reset()
        mean_loss.reset()
        self._collected, self._largest_batch = [], 0
        return values

    def _is_told(self) -> Callable[[], bool] | None:
        """Return the check for a request to stop generating text, or None.

        Tensor-parallel processes, which cut each matrix, must generate the same tokens.
        """
        if self.stops is not None and self.shards is not None and self.shards.tensor > 1:
            return partial(self.stops.is_told_together, self.shards.data_rank)
        return None if self.stops is None else self.stops.is_told

    # Optimizer -------------------------------------------------------------------------------

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer over all trainable parameters."""
        from_zero = [] if self.adapter is None else self.adapter.from_zero()
        scaled = self._trainer is not None and self.trainer.precision == "16-mixed"
        return build_optimizer(
            self.named_parameters(), self.optim_config, from_zero=from_zero, scaled=scaled
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        try:
            steps = self.trainer.estimated_stepping_batches
        except ValueError as error:  # the validation interval exceeds the number of batches
            raise UserError(
                f"trainer: {' '.join(str(error).split())} On the command line: "
                "trainer.val_check_interval=N, or trainer.check_val_every_n_epoch=null."
            ) from None
        config = self.optim_config
        if getattr(self.trainer, "fast_dev_run", False) and config.warmup > 1:
            config = replace(config, warmup=0.0)  # the run takes only about one step
        scheduler = build_scheduler(
            optimizer,
            config,
            None if math.isinf(steps) else max(int(steps), 1),
            mode=direction_of(self.task.config.monitor, self.task.config.mode),
        )
        schedule = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule, unless it depends on a metric.

        Schedules that depend on a metric step in each validation. Lightning would skip that step in
        the first epoch of a resumed run.
        """
        if self.optim_config.scheduler not in BY_METRIC:
            scheduler.step()

    def _step_by_metric(self, values: dict[str, Any]) -> None:
        monitor, scheduler = self.task.config.monitor, self.lr_schedulers()
        if monitor not in values:
            raise UserError(
                f"optim.scheduler={self.optim_config.scheduler} goes by {monitor}, which "
                f"validation does not measure. There are: {', '.join(values)}."
            )
        scheduler.step(float(values[monitor]))  # type: ignore[union-attr, arg-type]

    # Checkpoints -----------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the trainable tensors, unsharded, without the frozen base.

        All ranks must call this.
        """
        if self.model is None:
            return super().state_dict(*args, **kwargs)
        keep_vars = kwargs.pop("keep_vars", False)
        with self.whole_adapter():
            kept = {id(tensor) for tensor in self.trainable_tensors().values()}
            state = super().state_dict(*args, keep_vars=True, **kwargs)
        return {
            name: tensor if keep_vars else tensor.detach()
            for name, tensor in state.items()
            if id(tensor) in kept
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint's weights, which must be exactly the trainable tensors.

        Raises:
            UserError: If a tensor is missing, unexpected, of the wrong shape or not finite.
        """
        if self.model is None:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        with self.whole_adapter():
            check_tensors(self.state_dict(), dict(state_dict), source="the checkpoint")
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_losses()  # before a good checkpoint is overwritten
        if self.adapter is not None:
            self.adapter.check_frozen()
        # Store it among the arguments, so that load_from_checkpoint can build the model's head.
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["task_state"] = self.task.state()
        if self._from_data is not None:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["lora"] = asdict(self._from_data)
        checkpoint[RANKS] = data_ranks(self.trainer)
        checkpoint[ROWS] = self._rows()

    def _rows(self) -> str | None:
        """Return the fingerprint of the training rows' content, or None if it is unknown."""
        rows = getattr(getattr(self.trainer, "datamodule", None), "encoded", {}).get("train")
        return getattr(rows, "_fingerprint", None)

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
        content = read_checkpoint(checkpoint_path)
        ours = inspect.signature(LoraModule.__init__).parameters
        settings = arguments_from_file(
            content.pop(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}),
            checkpoint_path,
            typed=changes,
            added=[name for name in inspect.signature(cls.__init__).parameters if name not in ours],
        )
        checked = BytesIO()
        kept = {"state_dict": content["state_dict"], "pytorch-lightning_version": L.__version__}
        torch.save(kept, checked)
        checked.seek(0)
        return super().load_from_checkpoint(checked, map_location, **settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("task_state")
        if saved is None:
            raise UserError("this checkpoint was not written by lora_lightning.")
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if fits and checkpoint.get(RANKS, now := data_ranks(self.trainer)) != now:
            raise UserError(
                f"{checkpoint[RANKS]} processes saw different rows when this checkpoint was "
                f"written, and {now} do now, so its steps would be of other batches. Go on with as "
                "many, or start a new run from what it has learned: adapter=CHECKPOINT.ckpt."
            )
        rows = self._rows() if fits else None
        if rows is not None and checkpoint.get(ROWS) not in (None, rows):
            say(
                "the training data, or how they are read, have changed since this checkpoint was "
                "written: what comes now is learned from other rows than what was before.",
                file=sys.stderr,
            )
        if fits:
            with self.whole_adapter():
                optimizer = self.build_optimizer()
            check_optimizer(checkpoint.get("optimizer_states"), optimizer)
            keep_implementation(checkpoint["optimizer_states"][0]["param_groups"], optimizer)
        if saved != self.task.state():
            raise UserError(
                "the data or its labels differ from those that the checkpoint was trained with: "
                f"{saved} then, {self.task.state()} now."
            )


def _parts(batch: Batch) -> list[dict[str, Any]]:
    return batch if isinstance(batch, list) else [batch]
