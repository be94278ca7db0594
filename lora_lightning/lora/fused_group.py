"""`fused_linear` for several layers with the same input, such as query, key and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import differentiable_gradients, is_differentiated
from .products import grad_of_b, narrow, scaled, wide_product


class Linear(NamedTuple):
    """A frozen linear layer with its adapter, in the form that `fused_linear` takes."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    b: Tensor
    """B in the dtype of the input."""
    scaling: float


def fused_group(
    x: Tensor, layers: Sequence[Linear], a: Tensor, *, flight: object = None
) -> list[Tensor]:
    """Return the `fused_linear` outputs of several layers for the same x as one autograd step.

    One product serves all layers where it depends on x alone. Forward this is x A^T. Backward
    these are the gradients of the matrices A and their contribution to the gradient of x. The
    gradient of x is summed in place.

    Args:
        x: (..., in), in the dtype of the weights.
        layers: layers with equal scaling and equal dtype of A.
        a: the matrices A, stacked vertically, in the dtype of x.
        flight: an object that the graph refers to until its backward pass. None by default.
    """
    rows = x.reshape(-1, x.shape[-1])
    matrices = [*(layer.lora_A for layer in layers), *(layer.lora_B for layer in layers)]
    outputs = _FusedGroup.apply(rows, (layers, a, flight), *matrices)
    return [output.view(*x.shape[:-1], output.shape[1]) for output in outputs]


class _FusedGroup(torch.autograd.Function):
    """See `fused_group`. N is the number of rows of x, R the sum of the layers' ranks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, frozen: tuple[Any, ...], *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        layers, a, flight = frozen
        scaling = layers[0].scaling
        ranks = [layer.lora_A.shape[0] for layer in layers]
        down = narrow(rows, a.t(), scaling)  # (N, R)
        outputs = []
        for layer, part in zip(layers, down.split(ranks, dim=1), strict=True):
            output = F.linear(rows, layer.weight, layer.bias)
            outputs.append(output.addmm_(part, layer.b.t()))
        wants_a = any(ctx.needs_input_grad[2 : 2 + len(layers)])
        weights, bs = (layer.weight for layer in layers), (layer.b for layer in layers)
        ctx.save_for_backward(rows if wants_a else None, a, down, *weights, *bs)
        ctx.matrices = matrices
        ctx.scaling, ctx.ranks, ctx.flight = scaling, ranks, flight
        ctx.types = [matrix.dtype for matrix in matrices]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, a, down, *saved = ctx.saved_tensors
        ctx.flight = None
        count = len(ctx.ranks)
        weights, bs = saved[:count], saved[count:]
        wants_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        if is_differentiated():
            layers = list(zip(weights, ctx.matrices[:count], ctx.matrices[count:], strict=True))
            of_x, *of_matrices = differentiable_gradients(
                rows, layers, grads, scaling=ctx.scaling, wants=(wants_x, *wanted)
            )
            return of_x, None, *of_matrices
        of_a: list[Tensor | None] = [None] * count
        of_b: list[Tensor | None] = [None] * count
        grad_x = None
        # An unused output has no gradient, and its part of `up` is zero.
        unused = any(grad is None for grad in grads)
        up = torch.zeros_like(down) if unused else torch.empty_like(down)
        parts = zip(down.split(ctx.ranks, dim=1), up.split(ctx.ranks, dim=1), strict=True)
        for index, (of_layer, (down_part, up_part)) in enumerate(zip(grads, parts, strict=True)):
            if of_layer is None:
                continue
            if wanted[count + index]:
                of_b[index] = grad_of_b(of_layer, down_part, ctx.types[count + index])
            scaled(of_layer, bs[index], ctx.scaling, out=up_part)
            if wants_x and grad_x is None:
                grad_x = torch.mm(of_layer, weights[index])
            elif grad_x is not None:
                grad_x.addmm_(of_layer, weights[index])
        if grad_x is not None:
            grad_x.addmm_(up, a)
        if rows is not None:
            grad_a = wide_product(up.t(), rows, ctx.types[0])
            of_a = [
                part if wants and grad is not None else None
                for part, wants, grad in zip(grad_a.split(ctx.ranks), wanted, grads, strict=False)
            ]
        return grad_x, None, *of_a, *of_b
