"""Checks that tensors from a file fit the trainable parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lightning.errors import UserError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(expected: dict[str, Tensor], given: dict[str, Tensor], *, source: str) -> None:
    """Raise UserError unless `given` has the names and shapes of `expected` and is finite."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [n for n in expected if n in given and given[n].shape != expected[n].shape]
    shapes = [
        f"{n} is {tuple(given[n].shape)} instead of {tuple(expected[n].shape)}" for n in wrong
    ]
    problems = {
        f"lacks {len(missing)} tensors": missing,
        f"has {len(unexpected)} unexpected tensors": unexpected,
        f"has {len(wrong)} tensors of the wrong shape": shapes,
    }
    if any(problems.values()):
        listed = "; ".join(f"{what} ({_some(names)})" for what, names in problems.items() if names)
        cause = _cause(expected, given, wrong, unexpected)
        raise UserError(f"{source} does not fit the model: it {listed}. {cause}")
    counts = [name for name, tensor in expected.items() if tensor.dtype not in FLOATS]
    same = {name for name in counts if given[name].dtype == expected[name].dtype}
    check_values({k: tensor for k, tensor in given.items() if k not in same}, source=source)


def _cause(
    expected: dict[str, Tensor], given: dict[str, Tensor], wrong: list[str], unexpected: list[str]
) -> str:
    """Return the probable cause of a mismatch, by its kind."""
    saved = [n for n in wrong if not _is_of_adapter(n) and given[n].dim() and expected[n].dim()]
    rows = {(len(given[n]), len(expected[n])) for n in saved}
    alike = all(given[n].shape[1:] == expected[n].shape[1:] for n in saved)
    if saved == wrong and len(rows) == 1 and alike:
        ((in_file, in_model),) = rows
        return (
            f"Modules trained whole have {in_file} outputs in the file and {in_model} in the "
            "model: give the model as many classes or vocabulary rows."
        )
    if unexpected and not wrong and not any(map(_is_of_adapter, unexpected)):
        return (
            "These are whole weights, of a resized vocabulary or of modules that are not in "
            "modules_to_save of adapter_config.json."
        )
    return "Was it trained on another base model, or with other targets or rank?"


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name or "token_adapter" in name


def check_values(tensors: dict[str, Tensor], *, source: str) -> None:
    """Raise UserError unless all tensors are floating-point and finite in fp32."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}, must be float32, "
                "float16, bfloat16 or float64."
            )
    bad = _not_finite(tensors)
    if bad:
        raise UserError(
            f"{source} has values that are not finite in {_some(bad)}: the run that wrote it "
            "diverged, or the file is damaged."
        )


def check_trained(tensors: Mapping[str, Tensor], *, hint: str) -> None:
    """Raise UserError if training has ruined the weights, before they replace a good file.

    Args:
        tensors: the trainable tensors.
        hint: end of the message, such as what stays as it was.
    """
    bad = _not_finite(tensors)
    if bad:
        raise UserError(
            f"the trained weights are no longer finite, in {_some(bad)}: lower optim.lr. {hint}"
        )
    if tensors and not any(tensor.any() for tensor in tensors.values()):
        raise UserError(f"the trained weights are all zero, which training never gives. {hint}")


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()
    ]


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
