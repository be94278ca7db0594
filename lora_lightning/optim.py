"""Optimizers and learning-rate schedules, from torch and transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from .lora.errors import UserError, did_you_mean
from .settings import OptimConfig


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    *,
    from_zero: Collection[nn.Parameter] = (),
    scaled: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer over the parameters that require a gradient, and no others.

    Args:
        named_parameters: of the model.
        config: which optimizer.
        from_zero: those of LoRA's matrices that start at zero, whose rate is
            `config.loraplus_lr_ratio` times that of the rest (LoRA+).
        scaled: whether gradients carry a loss scale (16-mixed): a fused step would undo it itself,
            after they are clipped.
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
                "optim.loraplus_lr_ratio gives the adapter's B a rate of its own, and there is "
                "none to train: leave it out."
            )
        rate = config.lr * config.loraplus_lr_ratio
        trained = [parameter for parameter in from_zero if parameter.requires_grad]
        groups.append({"params": trained, "weight_decay": config.weight_decay, "lr": rate})
    known = _optimizers()
    if config.name not in known:
        raise UserError(
            f"optim.name: torch.optim has no {config.name!r}.{did_you_mean(config.name, known)}"
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


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over `total_steps` optimizer steps.

    Raises:
        UserError: there is no such schedule, or the rate would not come to its peak.
    """
    from transformers import SchedulerType, get_scheduler

    known = [kind.value for kind in SchedulerType]
    if config.scheduler not in known:
        raise UserError(
            f"optim.scheduler: {config.scheduler!r} is none of {', '.join(known)}."
            f"{did_you_mean(config.scheduler, known)}"
        )
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    if config.warmup > 1 and warmup >= total_steps:
        raise UserError(
            f"optim.warmup={config.warmup:g}: this run takes {total_steps} optimizer steps, so the "
            "rate would never come to optim.lr. Give fewer steps, or a share such as "
            "optim.warmup=0.06."
        )
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.scheduler,
        optimizer,
        num_warmup_steps=round(warmup),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(config.scheduler_options) or None,
    )
    return schedule


def _can_fuse(
    optimizer: Callable[..., Any], options: dict[str, Any], parameters: list[nn.Parameter]
) -> bool:
    """Whether one kernel can update all parameters, where nothing else is asked for."""
    asked = {"fused", "foreach", "capturable", "differentiable"} & options.keys()
    can = "fused" in inspect.signature(optimizer).parameters
    return can and not asked and all(parameter.is_cuda for parameter in parameters)


def keep_implementation(saved: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Has a checkpoint's groups step as this optimizer does, which may be on another device.

    Args:
        saved: the groups of the optimizer's state in the checkpoint.
        optimizer: of this run.
    """
    for theirs, ours in zip(saved, optimizer.param_groups, strict=True):
        theirs.update({name: ours[name] for name in ("fused", "foreach") if name in ours})


def _optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    return {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
