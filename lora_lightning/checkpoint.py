"""Checkpoints on disk: read without running what they hold, compared with what was to be kept."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora.checks import check_trained
from .lora.errors import UserError

LAST, PREVIOUS = "last.ckpt", "last-previous.ckpt"
"""What a run resumes from, and the one before it."""


class Damaged(UserError):
    """A checkpoint cannot be read."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU. Nothing but plain values and tensors is read.

    Raises:
        UserError: it is absent, truncated or damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("it is a ZIP that grows when it is read, which torch writes none")
            if (entry := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {entry} is wrong")
    except Exception as error:
        raise _damaged(path, error) from None
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip, pickle, or what a damaged pickle calls
        raise _damaged(path, error) from None
    weights = content.get("state_dict") if isinstance(content, dict) else None
    settings = content.get("hyper_parameters", {}) if isinstance(content, dict) else None
    if (
        not isinstance(weights, dict)
        or not all(isinstance(t, Tensor) and _is_held(t) for t in weights.values())
        or not isinstance(settings, dict)
    ):
        raise UserError(f"{path} is no checkpoint of lora_lightning.")
    return content  # type: ignore[no-any-return]


def _is_held(tensor: Tensor) -> bool:
    """Whether a tensor has each of its values in memory: a file may repeat one without end."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_resumable(content: dict[str, Any], path: Path) -> None:
    """Makes sure that a run can go on from a checkpoint, and from the step that it tells.

    Raises:
        UserError: something is absent or of another kind than a run writes.
    """
    problem = _missing(content) or _foreign(content["callbacks"], path.parent.parent)
    if problem is not None:
        raise UserError(
            f"a run cannot go on from {path}: {problem}. Something else than a run has written it. "
            "What it has learned is a start for a new run: adapter=CHECKPOINT.ckpt."
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
        return "its version of Lightning is none"
    return None


def _foreign(states: dict[str, Any], run_dir: Path) -> str | None:
    """A file that a callback's state names as a checkpoint of the run, and that may be another's.

    Lightning's ModelCheckpoint deletes such a file as soon as there is a better one. Ours looks for
    the names in its own folder, wherever the run was when they were written.
    """
    for key, state in states.items():
        if not isinstance(state, dict):
            continue
        best = state.get("best_k_models", {})
        if not isinstance(best, dict):
            return "it has no list of the best checkpoints"
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
                return f"{path} lies outside of the run, and would be deleted for a better one"
    return None


def _is_own(path: str, run_dir: Path) -> bool:
    """Whether a path lies in the run, or leads nowhere, as after the run was moved."""
    if not os.path.isabs(path) or os.path.normpath(path) != path:
        return False
    parent = Path(os.path.realpath(os.path.dirname(path)))
    return parent.is_relative_to(os.path.realpath(run_dir)) or not os.path.lexists(path)


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
"""What optimizers keep in the shape of a parameter."""


def check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Makes sure that the state of an optimizer in a checkpoint is one of this optimizer.

    Args:
        saved: the checkpoint's "optimizer_states".
        optimizer: as it is before the first step.

    Raises:
        UserError: it is not, or it holds values that are not finite.
    """
    problem = _unfit(saved, optimizer)
    if problem is not None:
        raise UserError(
            f"the optimizer's state in this checkpoint does not fit the run: {problem}. What the "
            "checkpoint has learned is a start for a new run: adapter=CHECKPOINT.ckpt."
        )


def _unfit(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        (one,) = saved
        groups, states = one["param_groups"], one["state"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in optimizer.param_groups]:
            return f"it has groups of {sizes} tensors"
        if not all(isinstance(group["lr"], (int, float, Tensor)) for group in groups):
            return "a learning rate is no number"
        for index, state in states.items():
            for name, value in state.items():
                shape = parameters[index].shape
                if name in _MOMENTS and value is not None and value.shape != shape:
                    return f"{name} of tensor {index} is {tuple(value.shape)}, not {tuple(shape)}"
                if isinstance(value, Tensor) and not value.isfinite().all():
                    return f"{name} of tensor {index} holds values that are not finite"
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _damaged(path: Path, error: Exception) -> Damaged:
    reason = re.split(r"[.:;] ", " ".join(str(error).split()))[0][:200] or type(error).__name__
    others = sorted(str(other) for other in path.parent.glob("best-*.ckpt") if other != path)
    instead = (
        f", or start from what it had learned at its best: adapter={others[0]} with another "
        "output_dir"
        if others
        else ""
    )
    return Damaged(
        f"{path} is truncated or damaged, or holds more than values and tensors: {reason}. "
        "Copy it again from where it is whole, or move it away to start the run again"
        f"{instead}."
    )


def check_kept(live: Mapping[str, Tensor]) -> None:
    """Makes sure that trained weights are worth a checkpoint.

    Raises:
        UserError: they are ruined: not finite, or all zero.
    """
    check_trained(live, kept="The checkpoint before it was left as it is.")


def check_written(path: Path, live: Mapping[str, Tensor]) -> None:
    """Makes sure that a checkpoint holds the trained weights, before it replaces an older one.

    Raises:
        UserError: the file cannot be read, or holds others.
    """
    found = _read(path)["state_dict"]
    same = found.keys() == live.keys() and all(
        torch.equal(found[name], tensor.detach().cpu()) for name, tensor in live.items()
    )
    if not same:
        raise UserError(
            f"{path} does not hold what was written to it: its disk or file system is at fault. "
            "The checkpoint before it was left as it is."
        )
