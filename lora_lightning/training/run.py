"""A run from a config to a trained adapter and its result.json."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lora_lightning.adapters.folder import (
    ADAPTER,
    BAD_STEP,
    RESULT,
    base_fingerprint,
    folder_bytes,
    read_sidecar,
    save_trained,
    versions,
    writable,
)
from lora_lightning.adapters.model_card import CARD, write_card
from lora_lightning.config.compose import (
    config_hash,
    saved_settings,
    settings_of,
    with_direction,
)
from lora_lightning.config.groups import Settings
from lora_lightning.config.saved import to_be_typed
from lora_lightning.config.schema import PAUSE
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.distributed.environment import has_lost_another, leave
from lora_lightning.distributed.hardware_speed import is_on_cpu
from lora_lightning.distributed.precision import automatic_precision_message, with_precision
from lora_lightning.distributed.tf32 import tf32_matmuls
from lora_lightning.errors import ProcessLost
from lora_lightning.lora import UserError
from lora_lightning.lora.serialization.checksums import SIDECAR, check_files
from lora_lightning.models.cpu_kernels import crowded
from lora_lightning.models.loading import load_model_config, load_tokenizer, max_positions
from lora_lightning.models.tokenizer import rows_in
from lora_lightning.tasks import Task, build_task
from lora_lightning.utils.atomic_write import fault_of_disk, remove_debris, write_json
from lora_lightning.utils.locks import locked
from lora_lightning.utils.logs import read_json
from lora_lightning.utils.output_folders import refuse_loss
from lora_lightning.utils.quiet import quiet_libraries
from lora_lightning.utils.terminal import command, say

from .callbacks.checkpoints import LastCheckpoint, Paused
from .callbacks.forgetting import Retention
from .callbacks.graceful_stop import Stopped, StopSignals
from .callbacks.heartbeat import Heartbeat
from .callbacks.loggers import count_from
from .callbacks.throughput import RunClock
from .checkpointing import check_resumable, read_checkpoint
from .module import LoraModule
from .preflight.memory import memory_advice
from .restore import blamed_before_first_step, refuse_unfit
from .results import (
    log_hparams,
    measured,
    of_rows,
    print_result,
    tell_early_stop,
)
from .run_folder import (
    continue_csv,
    earlier_result,
    last_checkpoint,
    refuse_used_folder,
    whole_checkpoint,
)
from .trainer import build_trainer, check_windows
from .warm_start import refuse_other_start, refuse_other_tokens, task_state_of

WRITTEN = (
    *(RESULT, BAD_STEP, PAUSE, "samples.jsonl", "csv/metrics.csv"),
    "checkpoints/*.ckpt",
    *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
)
"""Files of a run's folder that the holder of its lock writes beside their final path."""
_WORKER = re.compile(r"DataLoader worker \(pid.* (killed by signal|exited unexpectedly)")


class Interrupted(KeyboardInterrupt):
    """An interruption of a run from outside, after which the run can be resumed.

    Args:
        run_dir: Folder of the run.
        signum: Number of the signal.
        config: Config of the run.
    """

    def __init__(self, run_dir: Path, signum: int, config: DictConfig) -> None:
        begins = "" if last_checkpoint(run_dir) else " (from the start: no checkpoint was due yet)"
        again: dict[str, str] = {}
        with suppress(UserError):  # this process cannot resolve an interpolation
            again = to_be_typed(config)
        words = [command("train", resume=run_dir), *map(shlex.quote, again)]
        super().__init__(f"interrupted. To go on{begins}: {' '.join(words)}")
        self.signum = signum


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
    with (
        nullcontext()
        if saved is None
        else blamed_before_first_step(saved, config, lambda: signals.has_trained)
    ):
        return _train(config, signals, changes, resume=resume)


def _train(
    config: DictConfig, signals: StopSignals, changes: dict[str, Any], *, resume: bool
) -> dict[str, Any]:
    run_dir = Path(config.output_dir)
    quiet_libraries()
    checkpoint = whole_checkpoint(run_dir) if resume else None
    result: dict[str, Any] = {"status": "running", "config_hash": config_hash(config)}
    earlier = earlier_result(run_dir) if checkpoint else {}
    asked, config = config, with_precision(with_direction(config), earlier.get("precision"))
    settings = settings_of(config)
    result["precision"] = config.trainer.precision
    result["versions"] = versions()
    result["before"] = earlier.get("before", {})
    result["rungs"] = earlier.get("rungs", [])
    # A run that an earlier version started counts its logged steps from 0 until it ends.
    result["first_step"] = 1 if checkpoint is None else earlier.get("first_step", 0)
    # Lightning starts the other ranks later, when rank 0 has created the folder.
    rank_zero = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with ExitStack() as stack:
        if rank_zero:
            writable(run_dir)
            stack.enter_context(locked(run_dir, setting="output_dir"))
            remove_debris(*(run_dir / name for name in WRITTEN))
            if not resume:
                refuse_used_folder(run_dir)
            refuse_loss(run_dir / ADAPTER, by="train")  # fail before training, not after it
            write_json(run_dir / RESULT, result)
            if told := automatic_precision_message(asked, config):
                print(told, file=sys.stderr)
            accelerator = str(config.trainer.get("accelerator", "auto"))
            if is_on_cpu(accelerator) and (told := crowded(torch.get_num_threads())):
                say(told, file=sys.stderr)
            stack.push(lambda kind, error, trace: _record(run_dir, result, error))
        bar = config.trainer.get("enable_progress_bar", True)
        bar = bar and config.callbacks.get("progress_bar") is not None
        beat = stack.enter_context(Heartbeat(wanted=rank_zero and bar))
        _run_to_its_end(config, settings, run_dir, checkpoint, result, signals, changes, beat)
    return result


def _record(run_dir: Path, result: dict[str, Any], error: BaseException | None) -> None:
    """Write how a run ended. If this fails after an error, only the first error is reported."""
    if run_dir.is_dir():
        with suppress(UserError) if error is not None else nullcontext():
            write_json(run_dir / RESULT, result)


def _run_to_its_end(
    config: DictConfig,
    settings: Settings,
    run_dir: Path,
    checkpoint: Path | None,
    result: dict[str, Any],
    signals: StopSignals,
    changes: dict[str, Any],
    beat: Heartbeat,
) -> None:
    """Execute the run, and store in `result` how it ended."""
    try:
        accelerator = str(config.trainer.get("accelerator", "auto"))
        products = tf32_matmuls(config.trainer.precision, accelerator)
        with signals, memory_advice(config), products:
            _run(config, settings, run_dir, checkpoint, result, signals, changes, beat)
        result["status"] = "completed"
        leave()
    except Paused as pause:
        result["status"] = "paused"
        result["rungs"] = [*result["rungs"], pause.rung]
        result["steps"] = pause.rung["step"]
        result["objective"] = None
    except Stopped as stop:
        result["status"] = "interrupted"
        raise Interrupted(run_dir, stop.signum, config) from None
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning exits when it is interrupted
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            say(error.code, file=sys.stderr)
        result["status"] = "interrupted"
        raise Interrupted(run_dir, signal.SIGINT, config) from None
    except BaseException as error:
        if signals.received and not isinstance(error, UserError):  # its workers get the signal too
            result["status"] = "interrupted"
            raise Interrupted(run_dir, signals.received, config) from None
        result["status"] = "failed"
        result["error"] = f"{type(error).__name__}: {error}"[:2000]
        if not isinstance(error, UserError) and (fault := fault_of_disk(error)) is not None:
            raise UserError(
                f"{fault}. Nothing that was there before is lost: see to the disk and "
                f"{_way_on(run_dir)}."
            ) from error
        if isinstance(error, FileNotFoundError) and error.filename:
            gone = Path(os.fsdecode(error.filename))
            if run_dir in gone.parents:
                raise UserError(
                    f"{gone} is gone: was {run_dir} moved or deleted while the run wrote there? "
                    "What is gone is lost; start again, with another output_dir."
                ) from error
        if _WORKER.search(str(error)):
            raise ProcessLost(
                "a process that prepares batches was killed, as a system does that has no memory "
                f"left. data.num_workers=0 needs none of them; with it {_way_on(run_dir)}."
            ) from error
        if has_lost_another(error):
            raise ProcessLost(
                "another process of this run has died, or was killed. To go on: "
                f"{command('train', resume=run_dir)}"
            ) from error
        going = signals.has_trained and last_checkpoint(run_dir) is not None
        if going and not isinstance(error, UserError):
            say(f"failed. To go on: {command('train', resume=run_dir)}", file=sys.stderr)
        raise


def _way_on(run_dir: Path) -> str:
    goes_on = last_checkpoint(run_dir) is not None
    return f"go on: {command('train', resume=run_dir)}" if goes_on else "start again"


def _run(
    config: DictConfig,
    settings: Settings,
    run_dir: Path,
    checkpoint: Path | None,
    result: dict[str, Any],
    signals: StopSignals,
    changes: dict[str, Any],
    beat: Heartbeat,
) -> None:
    """Train and evaluate, and add the results to `result`."""
    L.seed_everything(config.seed, workers=True, verbose=False)
    task = build_task(settings.task)
    module, data = build(settings, task, seed=config.seed, adapter=config.adapter)
    trainer = beat.trainer = build_trainer(config, **changes)
    count_from(trainer, result["first_step"])
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    last = next((callback for callback in callbacks if isinstance(callback, LastCheckpoint)), None)
    _pause_where_told(last, config)
    if last is not None:
        last.signals, signals.saves = signals, True
    callbacks.insert(0, signals)
    if not any(isinstance(callback, RunClock) for callback in callbacks):
        callbacks.insert(0, RunClock())
    check_windows(trainer)
    clock = next(callback for callback in callbacks if isinstance(callback, RunClock))

    if config.test_before and checkpoint is None:
        result["before"] = _evaluate(trainer.test, module, data)
        signals.raise_if_told(trainer)
        if trainer.is_global_zero:
            write_json(run_dir / RESULT, result)  # a resumed run reads it from there
    if checkpoint is not None:
        _prepare_to_go_on(trainer, checkpoint, run_dir, first_step=result["first_step"])
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    signals.raise_if_told(trainer)
    if trainer.global_step == 0:
        raise UserError(
            "the run has come to its end without an optimizer step, so nothing is learned: give "
            "more rows, or a larger trainer.max_time."
        )
    tell_early_stop(trainer)
    _restore_best(trainer, module)
    base = base_fingerprint(module)  # all ranks must call this if the base is sharded
    with module.whole_adapter():
        if trainer.is_global_zero:
            save_trained(module, run_dir / ADAPTER, saved_settings(config), base=base, later=[CARD])
    module.logs_validation = False  # the validation curve covers only training
    _evaluate(trainer.validate, module, data)
    metrics = trainer.callback_metrics  # Lightning does not return metrics that no logger gets
    val = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
    test = _evaluate(trainer.test, module, data)
    result.update(measured(config, module, trainer, clock, {**val, **test}))
    for callback in callbacks:
        if isinstance(callback, Retention):
            result["before"] |= callback.before
    result |= of_rows(task, data)
    if trainer.is_global_zero:
        log_hparams(trainer, settings, config, result)
        write_card(run_dir / ADAPTER, run_dir, settings, module, data, result)
        result["adapter_bytes"] = folder_bytes(run_dir / ADAPTER)
        print_result(result, run_dir, data)


def _prepare_to_go_on(
    trainer: L.Trainer, checkpoint: Path, run_dir: Path, *, first_step: int
) -> None:
    """Check that a run can resume from a checkpoint, and cut its log to that step."""
    content = read_checkpoint(checkpoint)
    check_resumable(content, checkpoint)
    _refuse_other_places(trainer.callbacks, run_dir)  # type: ignore[attr-defined]
    step = content["global_step"]

    def go_on() -> None:
        continue_csv(trainer, step, first_step=first_step)
        if trainer.is_global_zero:
            print(f"goes on from step {step} ({checkpoint.name})", flush=True)

    refuse_unfit(trainer, content, checkpoint, then=go_on)


def _refuse_other_places(callbacks: list[L.Callback], run_dir: Path) -> None:
    """Raise UserError if a callback that deletes older checkpoints keeps them outside the run.

    The checkpoint names these files, and they may belong to others.
    """
    for callback in callbacks:
        place = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        if place and not Path(place).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(
                f"the run keeps its best checkpoints in {place}, outside of its folder: to go on "
                "may delete files there. Begin a new run with what it has learned: "
                "adapter=CHECKPOINT.ckpt."
            )


def build(
    settings: Settings, task: Task, *, seed: int, adapter: str | None = None
) -> tuple[LoraModule, LoraDataModule]:
    """Build the LightningModule and the data module of a run, which share task and tokenizer."""
    if adapter is not None:
        _check_start(adapter, settings)
    tokenizer = load_tokenizer(settings.model)
    model_config = load_model_config(settings.model)
    task.prepare(model_config)
    if adapter is not None:
        task.begin_with(task_state_of(adapter), adapter)
    limit = max_positions(model_config)
    data = LoraDataModule(
        task,
        tokenizer,
        settings.data,
        length_limit=limit,
        rows=None if settings.model.new_tokens else rows_in(model_config),
        seed=seed,
    )
    module = LoraModule(
        task,
        settings.model,
        settings.lora,
        settings.optim,
        seed=seed,
        tokenizer=tokenizer,
        start_from=adapter,
    )
    module.data = data
    return module, data


def _check_start(adapter: str, settings: Settings) -> None:
    """Raise UserError if the adapter for a warm start is damaged or fits another base."""
    if adapter.endswith(".ckpt"):
        return  # a checkpoint is checked when it is read
    theirs: dict[str, Any] = {}
    if (Path(adapter) / SIDECAR).is_file():
        sidecar = read_sidecar(Path(adapter))
        check_files(Path(adapter))
        theirs = sidecar["settings"]
        refuse_other_tokens(adapter, theirs["model"], settings.model)
    refuse_other_start(adapter, theirs, settings.model, settings.lora)


def _pause_where_told(last: LastCheckpoint | None, config: DictConfig) -> None:
    """Make the run pause at a rung if its sweep requests that."""
    path = Path(config.output_dir) / PAUSE
    if not path.is_file():
        return
    if last is None:
        raise UserError("launcher.halving needs checkpoints: leave callbacks.last as it is.")
    told = read_json(path)
    try:
        last.pause_at = float(told["at"]), str(config.task.monitor)
        last.rungs = [float(share) for share in told["rungs"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is damaged. Run the sweep's command again, which writes it again; or delete "
            "it, and the job trains to its end."
        ) from None


def _evaluate(run: Any, module: LoraModule, data: LoraDataModule) -> dict[str, float]:
    """Return the metrics of trainer.validate or trainer.test, empty if the split is missing."""
    found = run(module, data, verbose=False)
    return {name: float(value) for name, value in found[0].items()} if found else {}


def _restore_best(trainer: L.Trainer, module: LoraModule) -> None:
    """Load the weights of the best checkpoint into the module."""
    best = next(
        (
            callback.best_model_path
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.best_model_path
        ),
        "",
    )
    if best:
        module.load_state_dict(read_checkpoint(best)["state_dict"])
