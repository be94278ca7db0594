"""LoRA arithmetic, the only place that adds a low-rank product to a base output.

`fused_linear` is the fast path for a frozen linear layer with an accessible weight.
`add_low_rank` is the general path for any callable layer. Both compute the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import grad_of_b, narrow, wide_product


def add_low_rank(
    base_output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return base_output + scaling * x A^T B^T.

    The scaling is applied between the two products, where the tensor is narrowest. A and B are
    cast to the dtype of x, so that fp32 adapters work on a bf16 base.

    Args:
        base_output: (..., out), the frozen layer's output for x.
        x: (..., in), after dropout.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: alpha / r or another factor.
    """
    x = x.to(base_output.dtype) if not x.is_floating_point() else x
    down = F.linear(x, lora_A.to(x.dtype)) * scaling
    return base_output + F.linear(down, lora_B.to(down.dtype)).to(base_output.dtype)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    copies: tuple[Tensor, Tensor] | None = None,
    flight: object = None,
) -> Tensor:
    """Return x W^T + bias + scaling * dropout(x) A^T B^T as one autograd step.

    The mathematics equals a call of the layer followed by `add_low_rank`, with fewer passes over
    memory:

    * The low-rank product is accumulated in place into the base product, forward and backward.
    * x is saved once, and not at all where A is frozen.
    * A and B are cast to the dtype of x once.
    * The gradient of x is skipped where nothing needs it.

    The narrow products come first, so no (out, in) matrix is ever formed. x, A and B get
    gradients, while W and bias are frozen. If the gradients are differentiated (create_graph),
    plain operations compute them instead.

    Args:
        x: (..., in), in the dtype of weight.
        weight: (out, in).
        bias: (out), or None.
        lora_A: (r, in), of any floating-point dtype.
        lora_B: (out, r), of any floating-point dtype.
        scaling: alpha / r or another factor.
        dropout: probability of dropping an input of A. 0, the default, outside of training.
        copies: A and B in the dtype of x if they are already cast. None by default.
        flight: an object that the graph refers to until its backward pass. None by default.
    """
    # The reshape stays outside the Function. Models may change the output in place, which
    # autograd refuses for a view that a Function returns.
    rows = x.reshape(-1, x.shape[-1])
    frozen = weight, bias, copies, scaling, dropout, flight
    output: Tensor = _FusedLinear.apply(rows, lora_A, lora_B, frozen)
    return output.view(*x.shape[:-1], weight.shape[0])


class _FusedLinear(torch.autograd.Function):
    """See `fused_linear`. N is the number of rows of x over all its leading dimensions."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, lora_A: Tensor, lora_B: Tensor, frozen: tuple[Any, ...]
    ) -> Tensor:
        weight, bias, copies, scaling, dropout, flight = frozen
        a, b = copies or (lora_A.to(rows.dtype), lora_B.to(rows.dtype))
        down, mask = project_down(rows, a, scaling, dropout)
        output = F.linear(rows, weight, bias)
        output.addmm_(down, b.t())
        wants_a = ctx.needs_input_grad[1]
        ctx.save_for_backward(rows if wants_a else None, mask, weight, a, b, down)
        ctx.matrices = lora_A, lora_B
        ctx.scaling, ctx.dropout, ctx.flight = scaling, dropout, flight
        ctx.types = lora_A.dtype, lora_B.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        rows, mask, weight, a, b, down = ctx.saved_tensors
        ctx.flight = None
        wants_x, wants_a, wants_b, _ = ctx.needs_input_grad
        if is_differentiated():
            keep = None if mask is None else mask.to(weight.dtype) / (1.0 - ctx.dropout)
            wants = (wants_x, wants_a, wants_b)
            layers = [(weight, *ctx.matrices)]
            gradients = differentiable_gradients(
                rows, layers, [grad_rows], scaling=ctx.scaling, keep=keep, wants=wants
            )
            return *gradients, None
        grad_x = torch.mm(grad_rows, weight) if wants_x else None
        grad_a, grad_b = low_rank_backward(
            grad_rows,
            rows,
            mask,
            a,
            b,
            down,
            scaling=ctx.scaling,
            dropout=ctx.dropout,
            add_to=grad_x,
            wants=(wants_a, wants_b),
            types=ctx.types,
        )
        return grad_x, grad_a, grad_b, None


def differentiable_gradients(
    rows: Tensor | None,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    grads: Sequence[Tensor | None],
    *,
    scaling: float,
    wants: Sequence[bool],
    keep: Tensor | None = None,
) -> list[Tensor | None]:
    """Return differentiable gradients of x, of each A and of each B.

    Args:
        rows: x, (N, in).
        layers: W, A and B of each layer.
        grads: gradients of the layers' outputs.
        scaling: s.
        wants: which gradients to compute.
        keep: factors by which dropout multiplied the inputs of A. None, the default, for no
            dropout.
    """
    if rows is None:
        raise RuntimeError(
            "second derivatives need the inputs of layers, which are not kept if A is frozen: call "
            "adapter.set_fused(False) first."
        )
    dropped = rows if keep is None else rows * keep
    layers = [(w, a.view_as(a), b.view_as(b)) for w, a, b in layers]  # two may share a matrix
    pairs = []
    for (weight, a, b), grad in zip(layers, grads, strict=True):
        if grad is not None:
            down = F.linear(dropped, a.to(rows.dtype)) * scaling
            pairs.append((F.linear(rows, weight) + F.linear(down, b.to(rows.dtype)), grad))
    inputs = [rows, *(a for _, a, _ in layers), *(b for _, _, b in layers)]
    wanted = [tensor for tensor, wants_it in zip(inputs, wants, strict=True) if wants_it]
    outputs, of_outputs = zip(*pairs, strict=True)
    gradients = iter(
        torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True)
    )
    return [next(gradients) if wants_it else None for wants_it in wants]


def is_differentiated() -> bool:
    """Return whether autograd records the backward pass.

    It never records a compiled one.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def check_differentiated_once(what: str, instead: str) -> None:
    """Raise RuntimeError in a backward pass that is itself differentiated (create_graph)."""
    if is_differentiated():
        raise RuntimeError(f"{what} cannot be differentiated twice: {instead}.")


def project_down(
    rows: Tensor, a: Tensor, scaling: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Return scaling * dropout(x) A^T as (N, r), and the mask of kept inputs."""
    mask = None
    if dropout > 0.0:
        rows, mask = torch.native_dropout(rows, dropout, True)
    return narrow(rows, a.t(), scaling), mask


def low_rank_backward(
    grad_rows: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    a: Tensor,
    b: Tensor,
    down: Tensor,
    *,
    scaling: float,
    dropout: float,
    add_to: Tensor | None,
    wants: tuple[bool, bool],
    types: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the wanted gradients of A and B in their dtypes.

    The low-rank contribution to the gradient of x is added to `add_to`.
    """
    grad_a = grad_b = None
    wants_a, wants_b = wants
    type_a, type_b = types
    if wants_b:
        grad_b = grad_of_b(grad_rows, down, type_b)
    up = narrow(grad_rows, b, scaling)  # (N, r)
    if wants_a:
        assert rows is not None
        dropped = rows if mask is None else _dropped(rows, mask, dropout)
        grad_a = wide_product(up.t(), dropped, type_a)
    if add_to is not None:
        if mask is None:
            add_to.addmm_(up, a)
        else:
            add_to.add_(_dropped(torch.mm(up, a), mask, dropout))
    return grad_a, grad_b


def _dropped(tensor: Tensor, mask: Tensor, probability: float) -> Tensor:
    return tensor.mul(mask).mul_(1.0 / (1.0 - probability))


def add_low_rank_embedding(
    base_output: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """Return base_output + scaling * A[:, ids]^T B^T.

    Args:
        base_output: (..., dim), the frozen embedding of ids.
        ids: (...), token ids.
        lora_A: (r, vocabulary).
        lora_B: (dim, r).
        scaling: alpha / r, times the embedding's own scale if it has one.
    """
    down = F.embedding(ids, lora_A.t())
    return base_output + (F.linear(down, lora_B) * scaling).to(base_output.dtype)


def low_rank_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return the Frobenius norm of scaling * B A from r x r Gram matrices.

    The product itself is not formed. For several matrices, (E, r, in) and (E, out, r), the result
    is the norm of all of them together.
    """
    a, b = lora_A.detach().float(), lora_B.detach().float()
    squared = torch.sum((b.mT @ b) * (a @ a.mT))
    return scaling * squared.clamp_min(0.0).sqrt()
