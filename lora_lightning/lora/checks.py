"""Whether tensors from a file are those that a model trains."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UserError


def check_tensors(own: dict[str, Tensor], given: dict[str, Tensor], *, source: str) -> None:
    """Raises UserError unless `given` has the names and shapes of `own` and is finite."""
    problems = []
    for what, names in (
        ("it lacks", [name for name in own if name not in given]),
        ("it has unexpected", [name for name in given if name not in own]),
    ):
        if names:
            problems.append(f"{what} {len(names)} tensors ({_some(names)})")
    wrong = [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors have the wrong shape ({_some(wrong)})")
    if problems:
        raise UserError(
            f"{source} does not fit the model: {'; '.join(problems)}. "
            "Was it trained on another base model, or with other targets or rank?"
        )
    bad = [
        name
        for name, tensor in given.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise UserError(
            f"{source} holds values that are not finite in {_some(bad)}: "
            "the run that wrote it diverged, or the file is damaged."
        )


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
