"""A run from a config to a trained adapter and its result.json."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lora_lightning.adapters.folder import CARD, AdapterFolder
from lora_lightning.adapters.model_card import write_card
from lora_lightning.adapters.save import base_fingerprint, save_trained
from lora_lightning.config.compose import (
    config_hash,
    saved_settings,
    settings_of,
    with_direction,
)
from lora_lightning.distributed.hardware_speed import is_on_cpu
from lora_lightning.distributed.precision import automatic_precision_message, with_precision
from lora_lightning.distributed.tf32 import tf32_matmuls
from lora_lightning.lora import UserError
from lora_lightning.tasks import build_task
from lora_lightning.utils.atomic_write import remove_debris, write_json
from lora_lightning.utils.cpu_load import load_warning
from lora_lightning.utils.locks import locked
from lora_lightning.utils.output_folders import check_replaceable
from lora_lightning.utils.quiet import quiet_libraries
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import say
from lora_lightning.utils.versions import versions

from .callbacks.forgetting import Retention
from .callbacks.graceful_stop import StopSignals
from .callbacks.halving_pause import HalvingPause
from .callbacks.heartbeat import Heartbeat
from .callbacks.last_checkpoint import LastCheckpoint
from .callbacks.loggers import count_from
from .callbacks.throughput import RunClock
from .checkpoint_validation import check_checkpoint_folders, check_resumable
from .checkpointing import read_checkpoint
from .components import build_components
from .folder_checks import check_unused_folder, continue_csv, readable_checkpoint
from .outcome import recorded_outcome
from .preflight.memory import memory_advice
from .restore import blame_config_before_first_step, check_on_restore
from .results import (
    log_hparams,
    measurements,
    print_result,
    report_early_stop,
    row_facts,
)
from .trainer import build_trainer, check_accumulation


def train(
    config: DictConfig, *, resume: bool = False, saved: Path | None = None, **changes: Any
) -> dict[str, Any]:
    """Train, test the best adapter, and write the run's folder `config.output_dir`.

    Args:
        config: A composed config, see conf/train.yaml.
        resume: Whether to resume from the folder's last checkpoint. Defaults to False.
        saved: The file that the config was read from. Errors before the first step name it.
            Defaults to None.
        changes: Arguments of Lightning's Trainer, which override the config.

    Returns:
        The content of result.json.

    Raises:
        UserError: If something in the config or the data is wrong.
    """
    signals = StopSignals()
    blamed: AbstractContextManager[None] = nullcontext()
    if saved is not None:
        blamed = blame_config_before_first_step(saved, config, lambda: signals.has_trained)
    with blamed:
        return Run(config, signals, resume=resume).execute(**changes)


class Run:
    """One run: its folder, its module and data, its Trainer, and its result.

    Args:
        config: A composed config.
        signals: Signals that end the run.
        resume: Whether to resume from the folder's last checkpoint.
    """

    def __init__(self, config: DictConfig, signals: StopSignals, *, resume: bool) -> None:
        quiet_libraries()
        self.folder = RunFolder(Path(config.output_dir))
        self.signals = signals
        self.resume = resume
        self.checkpoint = readable_checkpoint(self.folder.path) if resume else None
        earlier = self.folder.read_result() if self.checkpoint else {}
        self.requested = config
        self.config = with_precision(with_direction(config), earlier.get("precision"))
        self.settings = settings_of(self.config)
        # A run that an earlier version started counts its logged steps from 0 until it ends.
        self.first_step = 1 if self.checkpoint is None else earlier.get("first_step", 0)
        self.result: dict[str, Any] = {
            "status": "running",
            "config_hash": config_hash(config),
            "precision": self.config.trainer.precision,
            "versions": versions(),
            "before": earlier.get("before", {}),
            "rungs": earlier.get("rungs", []),
            "first_step": self.first_step,
        }

    def execute(self, **changes: Any) -> dict[str, Any]:
        """Run from start to end, and return the content of result.json.

        Args:
            changes: Arguments of Lightning's Trainer, which override the config.
        """
        trainer_config = self.config.trainer
        accelerator = str(trainer_config.get("accelerator", "auto"))
        with ExitStack() as stack:
            # Lightning starts the other ranks later, when rank 0 has created the folder.
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                self._open_folder(stack, accelerator)
            heartbeat = stack.enter_context(self._heartbeat())
            outcome = recorded_outcome(self.result, self.folder.path, self.config, self.signals)
            stack.enter_context(outcome)
            stack.enter_context(self.signals)
            stack.enter_context(memory_advice(self.config))
            stack.enter_context(tf32_matmuls(trainer_config.precision, accelerator))
            self._prepare(heartbeat, changes)
            self._test_before()
            self._fit()
            self._save_adapter()
            self._summarize(self._evaluate())
        return self.result

    def _open_folder(self, stack: ExitStack, accelerator: str) -> None:
        """Lock the run's folder until the stack ends, which writes result.json at last."""
        self.folder.create()
        stack.enter_context(locked(self.folder.path, setting="output_dir"))
        remove_debris(*self.folder.replaced_files)
        if not self.resume:
            check_unused_folder(self.folder.path)
        check_replaceable(self.folder.adapter, by="train")  # fail before training, not after it
        write_json(self.folder.result, self.result)
        if message := automatic_precision_message(self.requested, self.config):
            print(message, file=sys.stderr)
        if is_on_cpu(accelerator) and (message := load_warning(torch.get_num_threads())):
            say(message, file=sys.stderr)
        stack.push(lambda kind, error, trace: self._record(error))

    def _record(self, error: BaseException | None) -> None:
        """Write how the run ended. If this fails after an error, only that error is reported."""
        if self.folder.path.is_dir():
            with suppress(UserError) if error is not None else nullcontext():
                write_json(self.folder.result, self.result)

    def _heartbeat(self) -> Heartbeat:
        bar = self.config.trainer.get("enable_progress_bar", True)
        bar = bar and self.config.callbacks.get("progress_bar") is not None
        return Heartbeat(wanted=bool(bar) and rank_zero_only.rank == 0)  # type: ignore[attr-defined]

    def _prepare(self, heartbeat: Heartbeat, changes: dict[str, Any]) -> None:
        """Build the module, the data module and the Trainer with its callbacks."""
        config = self.config
        L.seed_everything(config.seed, workers=True, verbose=False)
        self.task = build_task(self.settings.task)
        self.module, self.data = build_components(
            self.settings, self.task, seed=config.seed, start_from=config.adapter
        )
        self.trainer = heartbeat.trainer = build_trainer(config, **changes)
        count_from(self.trainer, self.first_step)
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        clock = next((c for c in callbacks if isinstance(c, RunClock)), None)
        self.clock = clock or RunClock()
        pause = HalvingPause.requested(self.folder.path, str(config.task.monitor))
        if pause is not None and not any(isinstance(c, LastCheckpoint) for c in callbacks):
            raise UserError("launcher.halving requires checkpoints: keep callbacks.last.")
        own = [self.clock if clock is None else None, self.signals, pause]
        callbacks[:0] = [callback for callback in own if callback is not None]
        check_accumulation(self.trainer)

    def _test_before(self) -> None:
        """Test the untrained model, so that the result shows what training gained."""
        if self.config.test_before and self.checkpoint is None:
            self.result["before"] = self._metrics_of(self.trainer.test)
            self.signals.raise_if_requested(self.trainer)
            if self.trainer.is_global_zero:
                write_json(self.folder.result, self.result)  # a resumed run reads it from there

    def _fit(self) -> None:
        """Train from the start or from the checkpoint, and take the best weights."""
        if self.checkpoint is not None:
            self._prepare_resume(self.checkpoint)
        self.trainer.fit(self.module, self.data, ckpt_path=self.checkpoint, weights_only=True)
        if self.trainer.interrupted:
            raise KeyboardInterrupt
        self.signals.raise_if_requested(self.trainer)
        if self.trainer.global_step == 0:
            raise UserError(
                "the run ended without an optimizer step, so nothing was trained: give more rows, "
                "or a larger trainer.max_time."
            )
        report_early_stop(self.trainer)
        checkpoints = self.trainer.checkpoint_callbacks
        best = [c.best_model_path for c in checkpoints if isinstance(c, ModelCheckpoint)]
        if any(best):
            path = next(path for path in best if path)
            self.module.load_state_dict(read_checkpoint(path)["state_dict"])

    def _prepare_resume(self, checkpoint: Path) -> None:
        """Check that the run can resume from a checkpoint, and cut its log to that step."""
        content = read_checkpoint(checkpoint)
        check_resumable(content, checkpoint)
        check_checkpoint_folders(self.trainer.callbacks, self.folder.path)  # type: ignore[attr-defined]
        step = content["global_step"]

        def resumed() -> None:
            continue_csv(self.trainer, step, first_step=self.first_step)
            if self.trainer.is_global_zero:
                print(f"resumes from step {step} ({checkpoint.name})", flush=True)

        check_on_restore(self.trainer, content, checkpoint, then=resumed)

    def _save_adapter(self) -> None:
        """Write the adapter's folder, without the card, which needs the final metrics."""
        base = base_fingerprint(self.module)  # all ranks must call this if the base is sharded
        with self.module.whole_adapter():
            if self.trainer.is_global_zero:
                settings = saved_settings(self.config)
                save_trained(self.module, self.folder.adapter, settings, base=base, later=[CARD])

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics of the trained adapter on the validation and the test rows."""
        self.module.logs_validation = False  # the validation curve covers only training
        self._metrics_of(self.trainer.validate)
        metrics = self.trainer.callback_metrics  # Lightning returns none that no logger gets
        val = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
        return {**val, **self._metrics_of(self.trainer.test)}

    def _metrics_of(self, evaluate: Any) -> dict[str, float]:
        """Return the metrics of trainer.validate or trainer.test, empty if the split is missing."""
        metrics = evaluate(self.module, self.data, verbose=False)
        return {name: float(value) for name, value in metrics[0].items()} if metrics else {}

    def _summarize(self, metrics: dict[str, float]) -> None:
        """Complete the result, and write the card, the HPARAMS tab and the summary."""
        self.result |= measurements(self.config, self.module, self.trainer, self.clock, metrics)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Retention):
                self.result["before"] |= callback.before
        self.result |= row_facts(self.task, self.data)
        if self.trainer.is_global_zero:
            log_hparams(self.trainer, self.settings, self.config, self.result)
            adapter, folder = self.folder.adapter, self.folder.path
            write_card(adapter, folder, self.settings, self.module, self.data, self.result)
            self.result["adapter_bytes"] = AdapterFolder(adapter).size()
            print_result(self.result, folder, self.data)
