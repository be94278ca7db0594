"""Lightning's Trainer, built from a config."""

from __future__ import annotations

import inspect
import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig, OmegaConf

from lora_lightning.config.compose import with_direction
from lora_lightning.config.instantiate import instantiate_all, instantiate_one
from lora_lightning.config.schema import MOST_PROCESSES
from lora_lightning.distributed.deepspeed import ZeroStrategy
from lora_lightning.distributed.environment import check_nodes
from lora_lightning.distributed.precision import lightning_precision
from lora_lightning.distributed.strategies import (
    ShardedStrategy,
    check_full_fine_tuning,
    check_strategy,
    resident,
)
from lora_lightning.errors import did_you_mean
from lora_lightning.lora import UserError

from .callbacks.best_checkpoint import sync_checkpoints


def build_trainer(config: DictConfig, **changes: Any) -> L.Trainer:
    """Build the Lightning Trainer that the config describes.

    Raises:
        UserError: If Lightning does not take the settings.
    """
    config = with_direction(config)
    arguments = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(arguments, dict)
    check_nodes(int(arguments.get("num_nodes") or 1))
    if isinstance(arguments.get("strategy"), dict):
        arguments["strategy"] = instantiate_one(config.trainer, "strategy")
    strategy = arguments.get("strategy")
    check_strategy(str(strategy))
    check_full_fine_tuning(strategy, full=config.lora.method == "full")
    if isinstance(strategy, ZeroStrategy):
        strategy.check(config.optim.name, str(arguments.get("precision")))
    if isinstance(strategy, ShardedStrategy) and strategy.asked != 1:
        strategy.check(config.optim.name)
    arguments |= changes
    precision = lightning_precision(str(arguments.pop("precision", "32-true")))
    if precision == "16-mixed":
        plugins = arguments.get("plugins") or []
        given = plugins if isinstance(plugins, list) else [plugins]
        arguments["plugins"] = [*given, half_precision(str(arguments.get("accelerator")))]
    else:
        arguments["precision"] = precision
    known = inspect.signature(L.Trainer).parameters
    for key in map(str, arguments):
        if key not in known:
            raise UserError(
                f"trainer.{key}: not an argument of Lightning's Trainer.{did_you_mean(key, known)}"
            )
    _check_argument_types(arguments)
    _check_processes(str(arguments.get("devices")))
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        value = arguments.get(key)
        if isinstance(value, (int, float)) and value == 0:
            raise UserError(f"trainer.{key}={value}: the run would not train. Leave it out.")
    loggers = instantiate_all(config.logger)
    # Lightning rejects a disabled progress bar with a bar callback, and a learning-rate monitor
    # without a logger.
    bar, logs = arguments.get("enable_progress_bar", True), bool(loggers)
    callbacks = [
        callback
        for callback in instantiate_all(config.callbacks)
        if (bar or not isinstance(callback, ProgressBar))
        and (logs or not isinstance(callback, LearningRateMonitor))
    ]
    try:
        arguments["strategy"] = _strategy(arguments)
        trainer = L.Trainer(
            **{
                "callbacks": callbacks,
                "logger": loggers or False,
                "default_root_dir": config.output_dir,
                "use_distributed_sampler": False,
                **{str(key): value for key, value in arguments.items()},
            }
        )
    except Exception as error:
        # Lightning's MisconfigurationException derives directly from Exception.
        values = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
        if not isinstance(error, values) and type(error).__name__ != "MisconfigurationException":
            raise
        reason = str(error).rstrip(".!")
        if "gpu backend" in reason:
            reason += ". Without a GPU: trainer=cpu"
        raise UserError(f"trainer: {reason}.") from error
    sync_checkpoints(trainer)
    return trainer


def _check_processes(devices: str) -> None:
    """Raise UserError for a number of devices that would fill the machine with processes."""
    if devices.isdecimal() and int(devices[:10]) > MOST_PROCESSES:
        raise UserError(f"trainer.devices={devices} must be at most {MOST_PROCESSES}.")


def _check_argument_types(arguments: dict[Any, Any]) -> None:
    """Raise UserError for a value whose type is not in Lightning's signature.

    Lightning itself fails in the middle of training, or takes "x" for true.
    """
    hints = get_type_hints(L.Trainer.__init__)
    for key, value in arguments.items():
        taken = _alternatives(hints[str(key)])
        plain = [each for each in taken if each in PLAIN]
        only = all(each in PLAIN or get_origin(each) is Literal for each in taken)
        only |= value is not None and set(taken) - set(plain) == {NoneType}
        if not plain or not (only or isinstance(value, tuple(PLAIN))):
            continue  # it may be an object, or a list
        expected = {int, float} if float in plain else set(plain)  # an int may stand for a float
        literals = [
            value for each in taken if get_origin(each) is Literal for value in get_args(each)
        ]
        if type(value) not in expected and value not in literals:
            names = " or ".join(PLAIN[each] for each in PLAIN if each in plain)
            got = "null" if value is None else repr(value)
            raise UserError(f"trainer.{key} must be {names}, got {got}.")


PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
"""Descriptions of the argument types of Lightning that a config can hold."""


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


FIRST_SCALE = 2.0**8
"""Initial loss scale in 16-mixed. torch's 2**16 suits a mean, but the loss here is a sum over
targets. With that scale it overflows in fp16, and the first steps are skipped until the scale is
lower."""


def half_precision(accelerator: str) -> MixedPrecision:
    """Return Lightning's 16-mixed plugin, with a loss scale that suits a summed loss.

    Args:
        accelerator: Value of `trainer.accelerator`.
    """
    device = accelerator if accelerator in ("cpu", "mps") else "cuda"
    scaler = torch.amp.GradScaler(device, init_scale=FIRST_SCALE)
    return MixedPrecision("16-mixed", device, scaler=scaler)


def _strategy(arguments: dict[Any, Any]) -> Any:
    """Return a run's strategy, where ours replace "auto" and Lightning's ddp.

    Ours keep the model on the device.
    """
    strategy = arguments.get("strategy") or "auto"
    if strategy != "auto":
        return resident(strategy)
    chosen = L.Trainer(
        accelerator=arguments.get("accelerator", "auto"),
        devices=arguments.get("devices", "auto"),
        num_nodes=arguments.get("num_nodes") or 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).strategy
    if isinstance(chosen, SingleDeviceStrategy):
        return resident(chosen)
    forks = chosen.launcher is not None and chosen.launcher.is_interactive_compatible
    return "auto" if forks else resident("ddp")  # "auto" forks in a notebook


def planned_steps(trainer: L.Trainer) -> int | None:
    """Return the number of optimizer steps of a run, or None if it has no end.

    Raises:
        UserError: If the validation interval exceeds the number of batches.
    """
    try:
        steps = trainer.estimated_stepping_batches
    except ValueError as error:
        raise UserError(
            f"trainer: {' '.join(str(error).split())} On the command line: "
            "trainer.val_check_interval=N, or trainer.check_val_every_n_epoch=null."
        ) from None
    return None if math.isinf(steps) else max(int(steps), 1)


def check_accumulation(trainer: L.Trainer) -> None:
    """Refuse a validation within an accumulation window, as it cannot be resumed exactly."""
    every, window = trainer.val_check_interval, trainer.accumulate_grad_batches
    if window == 1 or every is None or every == 1.0:
        return
    if not isinstance(every, int) or every % window:
        raise UserError(
            f"trainer.val_check_interval={every} must be a multiple of "
            f"trainer.accumulate_grad_batches={window}, or 1.0."
        )


def check_validation_interval(trainer: L.Trainer, batches: int) -> None:
    """Raise UserError if an epoch ends before its first validation.

    Args:
        trainer: Trainer of the run.
        batches: Number of batches of an epoch, before `trainer.limit_train_batches`.
    """
    every, limit = trainer.val_check_interval, trainer.limit_train_batches
    if limit is not None and limit != 1.0:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    within_epoch = isinstance(every, int) and trainer.check_val_every_n_epoch is not None
    if within_epoch and every > batches and trainer.limit_val_batches != 0:
        raise UserError(
            f"trainer.val_check_interval={every} must be at most {batches}, the batches of an "
            "epoch. To count over epochs: trainer.check_val_every_n_epoch=null."
        )
