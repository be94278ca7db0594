"""Checks of a checkpoint's content: is it what a run writes, and does it fit this run?"""

from __future__ import annotations

import copy
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.utils.run_folder import PREVIOUS


def check_resumable(content: dict[str, Any], path: Path) -> None:
    """Check that a run can resume from a checkpoint, at the step that the checkpoint states.

    Raises:
        UserError: If something is absent, or not of the kind that a run writes.
    """
    problem = _missing(content) or _foreign(content["callbacks"], path.parent.parent)
    if problem is not None:
        raise UserError(
            f"a run cannot resume from {path}: {problem}. It was not written by a run. For a new "
            "run that starts from its weights: adapter=CHECKPOINT.ckpt."
        )


def _missing(content: dict[str, Any]) -> str | None:
    for key, kind in _KINDS.items():
        if not isinstance(content.get(key), kind):
            return f"its {key!r} is absent or of the wrong kind"
    place: Any = content["loops"]
    for key in _STEPS:
        place = place.get(key) if isinstance(place, dict) else None
    if place != content["global_step"]:
        return (
            f"its loops have made {place} steps, and its 'global_step' is {content['global_step']}"
        )
    if not re.match(r"\d+\.\d+", content["pytorch-lightning_version"]):
        return "it names no version of Lightning"
    return None


def _foreign(states: dict[str, Any], run_dir: Path) -> str | None:
    """Describe a callback state that is invalid or names a file which may not be the run's.

    Lightning's ModelCheckpoint deletes the named file as soon as there is a better one.
    BestCheckpoint looks for the names in its own folder, even if the run was moved since.
    """
    for key, state in states.items():
        if not isinstance(state, dict):
            return f"the state of {key} is not a mapping"
        best = state.get("best_k_models", {})
        if not isinstance(best, dict):
            return "it has no list of the best checkpoints"
        scores = [*best.values(), *(state.get(name) for name in _SCORES)]
        if not all(score is None or is_number(score, or_nan=True) for score in scores):
            return f"{key} holds a score that is not a number"
        named = [*best, *(state.get(name) for name in ("best_model_path", "kth_best_model_path"))]
        refused = [(path, r"last.*") for path in named]
        refused += [(state.get("last_model_path"), re.escape(PREVIOUS))]
        for path, others in refused:
            if path is None or (isinstance(path, str) and not path):
                continue
            name = os.path.basename(path) if isinstance(path, str) else ""
            if not re.fullmatch(r"[^.\\\0][^\\\0]*\.ckpt", name) or re.fullmatch(others, name):
                return f"it names {path!r} as one of the best checkpoints"
            if not str(key).startswith("BestCheckpoint") and not _is_own(path, run_dir):
                return f"{path} is outside the run's folder, and would be deleted for a better one"
    return None


def _is_own(path: str, run_dir: Path) -> bool:
    """Return whether a path is in the run's folder, or does not exist, as after a move."""
    if not os.path.isabs(path) or os.path.normpath(path) != path:
        return False
    parent = Path(os.path.realpath(os.path.dirname(path)))
    return parent.is_relative_to(os.path.realpath(run_dir)) or not os.path.lexists(path)


def check_checkpoint_folders(callbacks: list[L.Callback], run_dir: Path) -> None:
    """Raise UserError if a callback that deletes older checkpoints keeps them outside the run.

    The checkpoint names these files, and they may belong to others.
    """
    for callback in callbacks:
        place = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        if place and not Path(place).resolve().is_relative_to(run_dir.resolve()):
            raise UserError(
                f"the run keeps its best checkpoints in {place}, outside of its folder, and a "
                "resumed run may delete files there. Start a new run: adapter=CHECKPOINT.ckpt."
            )


def describe_mismatch(saved: Any, own: Any, where: str, *, of: Sequence[Any] = ()) -> str | None:
    """Describe how a saved state differs in form from the run's own, or return None.

    Values that are None in `own` may become anything later, so they are not compared.

    Args:
        saved: Plain values and tensors, nested.
        own: The state that the run itself saves before its first step.
        where: Name of the state, for the message.
        of: Objects that take the keys of a mapping as attributes. A key that no run writes must
            not name such an attribute. Another version may write further keys, which stay unused.
            Defaults to ().
    """
    if own is None:
        return None
    parts: list[tuple[Any, Any, str]] = []
    problem = _mismatch_of_value(saved, own, of)
    if problem is not None:
        return f"{where} {problem}"
    if isinstance(own, dict):
        parts = [(saved[name], own[name], f"{where}.{name}") for name in own if name in saved]
    elif isinstance(own, (list, tuple)):
        parts = [(saved[i], own[i], f"{where}.{i}") for i in range(len(own))]
    return next((problem for part in parts if (problem := describe_mismatch(*part, of=of))), None)


def _mismatch_of_value(saved: Any, own: Any, of: Sequence[Any]) -> str | None:
    """Return the result of `describe_mismatch` for a value, without the values nested in it."""
    problem: str | None = None
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            problem = "is not a mapping"
        elif others := [name for name in saved if name not in own and _is_of(name, of)]:
            problem = f"holds {str(others[0])[:100]!r}, which no run writes"
    elif isinstance(own, (list, tuple)):
        if not isinstance(saved, (list, tuple)) or len(saved) != len(own):
            problem = f"is not a list of {len(own)}"
    elif isinstance(own, (bool, str)):
        if type(saved) is not type(own):
            problem = f"is {_shown(saved)}"
    elif isinstance(own, Tensor) and own.dim():
        if not isinstance(saved, Tensor) or saved.shape != own.shape:
            problem = f"is not a tensor of shape {tuple(own.shape)}"
    elif not is_number(saved, whole=isinstance(own, int)):
        problem = f"is {_shown(saved)}, not a {'whole ' * isinstance(own, int)}number"
    return problem


def _is_of(name: Any, owners: Sequence[Any]) -> bool:
    return any(hasattr(owner, str(name)) for owner in owners)


def is_number(value: Any, *, whole: bool = False, or_nan: bool = False) -> bool:
    """Return whether a saved value or one-element tensor is a real number in the valid range.

    Args:
        value: Value from a checkpoint.
        whole: Whether it must be an integer. Defaults to False.
        or_nan: Whether it may be NaN. Defaults to False.
    """
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, float):
        return not whole and (or_nan or not math.isnan(value))
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {' '.join(repr(value).split())[:100]}"


_SCORES = ("best_model_score", "current_score", "kth_value")
_KINDS = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "data_ranks": int,
}
_STEPS = (
    *("fit_loop", "epoch_loop.automatic_optimization.optim_progress"),
    *("optimizer", "step", "total", "completed"),
)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg")
"""Optimizer states that have the shape of their parameter."""


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer state in a checkpoint fits this optimizer.

    Args:
        saved: The checkpoint's "optimizer_states".
        optimizer: The optimizer before its first step.

    Raises:
        UserError: If the state does not fit, or holds values that are not finite.
    """
    problem = _unfit(saved, optimizer)
    if problem is not None:
        raise UserError(
            f"the optimizer's state in this checkpoint does not fit the run: {problem}. For a new "
            "run that starts from its weights: adapter=CHECKPOINT.ckpt."
        )


def _unfit(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        (one,) = saved
        groups, states = one["param_groups"], one["state"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            return f"it has groups of {sizes} tensors"
        if not all(is_number(group["lr"]) for group in groups):
            return "a learning rate is not a number"
        own = optimizer.state_dict()["param_groups"]
        problems = [describe_mismatch(groups[n], own[n], f"group {n}") for n in range(len(own))]
        expected = {n: _expected_state(optimizer, n) for n in {p.dim() for p in parameters}}
        for index, state in states.items():
            parameter = parameters[index]
            problems.append(_unfit_state(state, parameter, expected[parameter.dim()], index))
        return next((problem for problem in problems if problem), None)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _unfit_state(
    state: dict[str, Any], parameter: Tensor, states: dict[str, Any], index: Any
) -> str | None:
    """Describe how the saved optimizer state of a tensor differs from the expected one."""
    shape = tuple(parameter.shape)
    if lost := states.keys() - state.keys():
        return f"{min(lost)} of tensor {index} is absent"
    for name, value in state.items():
        expected = states.get(name)
        if isinstance(expected, Tensor) and not _is_like(value, expected):
            return f"{name} of tensor {index} is {_shown(value)}"
        if name in _MOMENTS and value is not None and value.shape != shape:
            return f"{name} of tensor {index} is {tuple(value.shape)}, not {shape}"
        if isinstance(value, Tensor) and not value.isfinite().all():
            return f"{name} of tensor {index} holds values that are not finite"
    return None


def _is_like(value: Any, expected: Tensor) -> bool:
    """Return whether a saved value is a tensor of the same kind of number.

    If the expected tensor is a scalar, the value must have one element.
    """
    return (
        isinstance(value, Tensor)
        and value.is_floating_point() == expected.is_floating_point()
        and (expected.dim() > 0 or value.numel() == 1)
    )


def _expected_state(optimizer: torch.optim.Optimizer, dimensions: int) -> dict[str, Any]:
    """Return the state that an optimizer keeps for a tensor with this many dimensions.

    A copy of the optimizer takes a step on a tensor with a single zero.
    """
    probe = copy.copy(optimizer)
    tensor = torch.nn.Parameter(torch.zeros([1] * dimensions))
    tensor.grad = torch.zeros([1] * dimensions)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [tensor], "fused": None}]
    probe.state = defaultdict(dict)
    try:
        probe.step()
    except Exception:  # the optimizer needs more than gradients
        return {}
    return dict(probe.state[tensor])
