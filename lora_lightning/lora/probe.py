"""Probes that call a layer with a few inputs to find how it uses its weight.

torch's own classes and transformers' Conv1D are known. Any other class with `in_features`,
`out_features` and `weight` may store the weight as (in, out), scale it, or do more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OUT_IN, IN_OUT = "(out, in)", "(in, out)"
_ROWS = 3


def layout_of(layer: nn.Module) -> str | None:
    """Return the layout of a linear layer's weight W, "(out, in)" or "(in, out)".

    None means that the layer does not compute W x. A weight that is quantized, sharded or without
    values is assumed to be (out, in).
    """
    weight: Any = getattr(layer, "weight", None)
    if type(layer).forward is nn.Linear.forward or not _is_dense(weight):
        return OUT_IN
    fan_in, fan_out = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    shape = tuple(weight.shape)
    if shape not in ((fan_out, fan_in), (fan_in, fan_out)):
        return None
    x = _numbers((_ROWS, fan_in), weight)
    output = _called(layer, lambda: layer(x) - layer(torch.zeros_like(x)))
    for layout, matrix in ((OUT_IN, weight.mT), (IN_OUT, weight)):
        if matrix.shape == (fan_in, fan_out) and _agree(output, x @ matrix.detach()):
            return layout
    return None


def returns_rows(layer: nn.Embedding) -> bool:
    """Return whether an embedding gives the rows of its weight.

    If it has an `embed_scale`, the rows are multiplied by that factor.
    """
    if type(layer).forward is nn.Embedding.forward or not _is_dense(layer.weight):
        return True
    ids = torch.arange(min(_ROWS, len(layer.weight)), device=layer.weight.device)
    rows = layer.weight.detach()[ids] * getattr(layer, "embed_scale", 1.0)
    return _agree(_called(layer, lambda: layer(ids)), rows)


def same_output(layer: nn.Module, other: Callable[..., Tensor], like: Tensor, width: int) -> bool:
    """Return whether two calls give the same output for a few inputs.

    Without values in memory the result is True.

    Args:
        layer: the first callable, which is in evaluation mode for both calls.
        other: the second callable, with the same input.
        like: tensor with the dtype and device of the inputs.
        width: width of the inputs, or 0 for token ids.
    """
    if not _is_dense(like):
        return True
    ids = torch.arange(min(_ROWS, len(like)), device=like.device)
    x = _numbers((_ROWS, width), like) if width else ids
    expected = _called(layer, lambda: other(x))
    output = _called(layer, lambda: layer(x))
    return expected is not None and _agree(output, expected)


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is known to do no more than a torch class or Conv1D does."""
    known: tuple[Any, ...] = (nn.Linear.forward, nn.Embedding.forward)
    named = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    return (named or type(layer).forward in known) and not hooked


def _is_dense(weight: Any) -> bool:
    """Return whether a weight holds plain, unquantized values in memory."""
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta
    return plain and weight.is_floating_point() and weight.dtype.itemsize > 1


def _numbers(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return random values without a change of any other random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(like)


@torch.no_grad()
def _called(layer: nn.Module, call: Callable[[], Any]) -> Tensor | None:
    """Return the result of a call in evaluation mode, or None if it fails or is no tensor."""
    training = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        output = call()
    except Exception:  # third-party code may raise anything for an unexpected input
        return None
    finally:
        for module, was in training.items():
            module.training = was
    return output if isinstance(output, Tensor) else None


def _agree(output: Tensor | None, expected: Tensor) -> bool:
    if output is None or output.shape != expected.shape:
        return False
    most = 4 * torch.finfo(expected.dtype).eps ** 0.75 * expected.abs().max().clamp_min(1e-6)
    return bool((output - expected).abs().max() <= most)
