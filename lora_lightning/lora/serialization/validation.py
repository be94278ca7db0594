"""Checks that tensors from a file fit the trainable parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(own: dict[str, Tensor], given: dict[str, Tensor], *, source: str) -> None:
    """Raise UserError unless `given` has the names and shapes of `own` and is finite."""
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
            f"{source} does not fit the model: {'; '.join(problems)}. {_why(own, given)}"
        )
    counts = [name for name, tensor in own.items() if tensor.dtype not in FLOATS]
    same = {name for name in counts if given[name].dtype == own[name].dtype}
    check_values({k: tensor for k, tensor in given.items() if k not in same}, source=source)


def _why(own: dict[str, Tensor], given: dict[str, Tensor]) -> str:
    """Return the probable cause of a mismatch, by its kind."""
    wrong = [n for n in own if n in given and given[n].shape != own[n].shape]
    whole = [n for n in wrong if not _is_of_adapter(n)]
    counts = {
        (given[n].shape[:1], own[n].shape[:1]) for n in whole if given[n].dim() and own[n].dim()
    }
    alike = all(given[n].shape[1:] == own[n].shape[1:] for n in whole)
    if whole == wrong and len(counts) == 1 and alike:
        (((theirs,), (ours,)),) = counts
        return (
            f"Modules trained whole have {theirs} outputs there and {ours} here: another number of "
            "classes, or a vocabulary that has grown. Give the model as many first."
        )
    more = [name for name in given if name not in own]
    if more and not wrong and not any(map(_is_of_adapter, more)):
        return (
            "These are whole weights: of a vocabulary that had grown, or of modules that "
            "adapter_config.json does not list (modules_to_save)."
        )
    return "Was it trained on another base model, or with other targets or rank?"


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name or "token_adapter" in name


def check_values(tensors: dict[str, Tensor], *, source: str) -> None:
    """Raise UserError unless all tensors are floating-point and finite in fp32."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{source} holds {name} as {str(tensor.dtype).removeprefix('torch.')}: an adapter "
                "is stored in float32, float16, bfloat16 or float64."
            )
    bad = _not_finite(tensors)
    if bad:
        raise UserError(
            f"{source} holds values that are not finite in {_some(bad)}: "
            "the run that wrote it diverged, or the file is damaged."
        )


def check_trained(tensors: Mapping[str, Tensor], *, kept: str) -> None:
    """Raise UserError if training has ruined the weights, before they replace a good file.

    Args:
        tensors: the trainable tensors.
        kept: what is not overwritten, for the message.
    """
    bad = _not_finite(tensors)
    if bad:
        raise UserError(
            f"the trained weights are no longer finite, in {_some(bad)}: lower optim.lr. {kept}"
        )
    if tensors and not any(tensor.any() for tensor in tensors.values()):
        raise UserError(f"the trained weights are all zero, which no training leaves. {kept}")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()
    ]


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
