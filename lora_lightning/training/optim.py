"""Optimizers and learning-rate schedules, from torch and transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from lora_lightning.config.schema import OptimConfig
from lora_lightning.errors import UserError, did_you_mean


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    *,
    from_zero: Collection[nn.Parameter] = (),
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters that require a gradient.

    Args:
        named_parameters: Named parameters of the model.
        config: Optimizer settings.
        from_zero: LoRA matrices that start at zero. Their learning rate is
            `config.loraplus_lr_ratio` times the rate of the rest (LoRA+). Defaults to ().
        scaled: Whether gradients carry a loss scale (16-mixed). A fused step would unscale them
            itself, after clipping. Defaults to False.
    """
    faster = set(from_zero) if config.loraplus_lr_ratio is not None else set()
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad and parameter not in faster:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.loraplus_lr_ratio is not None:
        if not faster:
            raise UserError(
                "optim.loraplus_lr_ratio requires an adapter, whose B gets its own rate. Leave it "
                "out in full fine-tuning."
            )
        rate = config.lr * config.loraplus_lr_ratio
        trained = [parameter for parameter in from_zero if parameter.requires_grad]
        groups.append({"params": trained, "weight_decay": config.weight_decay, "lr": rate})
    known = _optimizers()
    if config.name not in known:
        raise UserError(
            f"optim.name={config.name}: not found in torch.optim.{did_you_mean(config.name, known)}"
        )
    options = dict(config.options)
    if not scaled and _can_fuse(known[config.name], options, matrices + vectors + [*faster]):
        options["fused"] = True
    try:
        return known[config.name](
            [group for group in groups if group["params"]], lr=config.lr, **options
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"optim: {config.name} does not take these settings: {error}.") from None


BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that depend on validation metrics, not on the number of steps."""
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", *BY_METRIC)
"""Schedules that do not need the total number of steps."""
LEAST_RATE = 0.1
"""Default final rate of schedules with a minimum rate, as a share of the peak rate."""
DECAY = 0.1
"""Default share of all steps in which warmup_stable_decay decays."""


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    total_steps: int | None,
    *,
    mode: str = "min",
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build the learning-rate schedule over a run's optimizer steps.

    Args:
        optimizer: Optimizer whose rates the schedule sets.
        config: Schedule settings.
        total_steps: Total number of optimizer steps. None means that the run has no fixed end.
        mode: Whether "max" or "min" of the monitored metric is best, for schedules in `BY_METRIC`.
            Defaults to "min".

    Raises:
        UserError: If transformers has no such schedule, it does not take these settings, or the
            rate never reaches its peak.
    """
    from transformers import SchedulerType, get_scheduler

    known = [kind.value for kind in SchedulerType]
    name, options = config.scheduler, dict(config.scheduler_options)
    if name not in known:
        raise UserError(
            f"optim.scheduler={name}: not found.{did_you_mean(name, known)} Known: "
            f"{', '.join(known)}."
        )
    if total_steps is None and (name not in ENDLESS or 0 < config.warmup < 1):
        least = "optim.warmup is a share of all steps" if name in ENDLESS else f"{name} ends"
        raise UserError(
            f"trainer.max_epochs=-1: the run has no end, and {least}. Give trainer.max_steps=N, or "
            "optim.scheduler=constant_with_warmup with optim.warmup=N steps."
        )
    if name in BY_METRIC:
        options.setdefault("mode", mode)
    elif name == "warmup_stable_decay":
        options.setdefault("num_decay_steps", max(round(DECAY * (total_steps or 0)), 1))
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and "min_lr" not in options:
        options.setdefault("min_lr_rate", LEAST_RATE)
    elif name in ("constant", "constant_with_warmup") and options:  # transformers ignores them
        raise UserError(f"optim.scheduler={name} takes no optim.scheduler_options. Leave them out.")
    warmup = config.warmup if config.warmup >= 1 else config.warmup * (total_steps or 0)
    if config.warmup > 1 and total_steps is not None and warmup >= total_steps:
        raise UserError(
            f"optim.warmup={config.warmup:g}: this run takes {total_steps} optimizer steps, so the "
            "rate would never reach optim.lr. Give fewer steps, or a share such as "
            "optim.warmup=0.06."
        )
    try:
        schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=round(warmup),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optim.scheduler={name} does not take these optim.scheduler_options: {error}."
        ) from None
    return schedule


def step_by_metric(
    scheduler: Any, config: OptimConfig, values: dict[str, Any], monitor: str
) -> None:
    """Step a schedule that depends on the monitored metric, after a validation.

    Args:
        scheduler: Schedule in `BY_METRIC`.
        config: Schedule settings.
        values: Metrics of the validation by name.
        monitor: Name of the monitored metric.

    Raises:
        UserError: If the validation does not measure the metric.
    """
    if monitor not in values:
        raise UserError(
            f"optim.scheduler={config.scheduler} requires {monitor}, which validation does not "
            f"measure. It measures: {', '.join(values)}."
        )
    scheduler.step(float(values[monitor]))


def check_schedule_metric(config: OptimConfig, *, validates: bool) -> None:
    """Raise UserError for a schedule that depends on validation, in a run without it."""
    if config.scheduler in BY_METRIC and not validates:
        raise UserError(
            f"optim.scheduler={config.scheduler} requires a validation. Give data.val=FILE, or "
            "another schedule."
        )


def _can_fuse(
    optimizer: Callable[..., Any], options: dict[str, Any], parameters: list[nn.Parameter]
) -> bool:
    """Return whether one kernel can update all parameters and no other option is set."""
    typed = {"fused", "foreach", "capturable", "differentiable"} & options.keys()
    can = "fused" in inspect.signature(optimizer).parameters
    return can and not typed and all(parameter.is_cuda for parameter in parameters)


def adopt_implementation(saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Make a checkpoint's groups step as this optimizer does, which may be on another device.

    Args:
        saved: Parameter groups of the optimizer state in the checkpoint.
        optimizer: Optimizer of this run.
    """
    for stored, current in zip(saved, optimizer.param_groups, strict=True):
        stored.update({name: current[name] for name in ("fused", "foreach") if name in current})


def _optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
