"""What a layer does with its weight, found by calling it with a few inputs.

Classes of torch's own and transformers' Conv1D are known. Any other that has `in_features`,
`out_features` and `weight` may hold the weight as (in, out), scale it, or do more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OUT_IN, IN_OUT = "(out, in)", "(in, out)"
_ROWS = 3


def layout_of(layer: nn.Module) -> str | None:
    """How a linear layer's weight W lies: "(out, in)" or "(in, out)"; None: it does not give W x.

    A weight that is quantised, sharded or without values is taken to be (out, in).
    """
    weight: Any = getattr(layer, "weight", None)
    if type(layer).forward is nn.Linear.forward or not _is_dense(weight):
        return OUT_IN
    fan_in, fan_out = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    shape = tuple(weight.shape)
    if shape not in ((fan_out, fan_in), (fan_in, fan_out)):
        return None
    x = _numbers((_ROWS, fan_in), weight)
    found = _called(layer, lambda: layer(x) - layer(torch.zeros_like(x)))
    for layout, matrix in ((OUT_IN, weight.mT), (IN_OUT, weight)):
        if matrix.shape == (fan_in, fan_out) and _agree(found, x @ matrix.detach()):
            return layout
    return None


def gives_rows(layer: nn.Embedding) -> bool:
    """Whether an embedding gives the rows of its weight, times its `embed_scale` if it has one."""
    if type(layer).forward is nn.Embedding.forward or not _is_dense(layer.weight):
        return True
    ids = torch.arange(min(_ROWS, len(layer.weight)), device=layer.weight.device)
    rows = layer.weight.detach()[ids] * getattr(layer, "embed_scale", 1.0)
    return _agree(_called(layer, lambda: layer(ids)), rows)


def same_output(layer: nn.Module, other: Callable[..., Tensor], like: Tensor, width: int) -> bool:
    """Whether two calls give the same for a few inputs; True where there are no values.

    Args:
        layer: the one, which is also put in evaluation mode for the time.
        other: the other, called with the same input.
        like: tells the type and the device of inputs.
        width: of inputs; 0: they are token ids.
    """
    if not _is_dense(like):
        return True
    ids = torch.arange(min(_ROWS, len(like)), device=like.device)
    x = _numbers((_ROWS, width), like) if width else ids
    expected = _called(layer, lambda: other(x))
    found = _called(layer, lambda: layer(x))
    return expected is not None and _agree(found, expected)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is known to do no more than its class of torch's own, or Conv1D."""
    known: tuple[Any, ...] = (nn.Linear.forward, nn.Embedding.forward)
    named = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    return (named or type(layer).forward in known) and not hooked


def _is_dense(weight: Any) -> bool:
    """Whether a weight is numbers in memory that stand for themselves."""
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and not weight.is_meta
    return plain and weight.is_floating_point() and weight.dtype.itemsize > 1


def _numbers(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Values that no other use of random numbers notices."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(like)


@torch.no_grad()
def _called(layer: nn.Module, call: Callable[[], Any]) -> Tensor | None:
    """The result of a call in evaluation mode; None: it fails, or is no tensor."""
    training = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        found = call()
    except Exception:  # whatever code of others raises for an input it does not expect
        return None
    finally:
        for module, was in training.items():
            module.training = was
    return found if isinstance(found, Tensor) else None


def _agree(found: Tensor | None, expected: Tensor) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    most = 4 * torch.finfo(expected.dtype).eps ** 0.75 * expected.abs().max().clamp_min(1e-6)
    return bool((found - expected).abs().max() <= most)
