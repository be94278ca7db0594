"""LoRA arithmetic, the only place that adds a low-rank product to a base output.

`fused_linear` is the fast path for a frozen linear layer with an accessible weight.
`add_low_rank` is the general path for any callable layer. Both compute the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_ON = ("cuda",)
"""Device types on which the launch of a product costs more than its size."""


def joins_products(device: torch.device) -> bool:
    """Return whether one large product is faster than several small ones."""
    return device.type in GROUPED_ON


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
        down, mask = _down(rows, a, scaling, dropout)
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
        if _is_recorded():
            keep = None if mask is None else mask.to(weight.dtype) / (1.0 - ctx.dropout)
            wants = (wants_x, wants_a, wants_b)
            layers = [(weight, *ctx.matrices)]
            again = _recorded(
                rows, layers, [grad_rows], scaling=ctx.scaling, keep=keep, wants=wants
            )
            return *again, None
        grad_x = torch.mm(grad_rows, weight) if wants_x else None
        grad_a, grad_b = _low_rank_backward(
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
        down = _narrow(rows, a.t(), scaling)  # (N, R)
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
        if _is_recorded():
            layers = list(zip(weights, ctx.matrices[:count], ctx.matrices[count:], strict=True))
            of_x, *again = _recorded(
                rows, layers, grads, scaling=ctx.scaling, wants=(wants_x, *wanted)
            )
            return of_x, None, *again
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
                of_b[index] = _grad_of_b(of_layer, down_part, ctx.types[count + index])
            _scaled(of_layer, bs[index], ctx.scaling, out=up_part)
            if wants_x and grad_x is None:
                grad_x = torch.mm(of_layer, weights[index])
            elif grad_x is not None:
                grad_x.addmm_(of_layer, weights[index])
        if grad_x is not None:
            grad_x.addmm_(up, a)
        if rows is not None:
            whole = _product(up.t(), rows, ctx.types[0])
            of_a = [
                part if wants and grad is not None else None
                for part, wants, grad in zip(whole.split(ctx.ranks), wanted, grads, strict=False)
            ]
        return grad_x, None, *of_a, *of_b


def _recorded(
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
            "second derivatives need the inputs of layers, which nothing has kept since their A is "
            "frozen: call adapter.set_fused(False) first."
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
    found = iter(
        torch.autograd.grad(outputs, wanted, of_outputs, create_graph=True, allow_unused=True)
    )
    return [next(found) if wants_it else None for wants_it in wants]


def _is_recorded() -> bool:
    """Return whether autograd records the backward pass.

    It never records a compiled one.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_second_derivatives(what: str, instead: str) -> None:
    """Raise RuntimeError in a backward pass that is itself differentiated (create_graph)."""
    if _is_recorded():
        raise RuntimeError(f"{what} cannot be differentiated twice: {instead}.")


def _down(rows: Tensor, a: Tensor, scaling: float, dropout: float) -> tuple[Tensor, Tensor | None]:
    """Return scaling * dropout(x) A^T as (N, r), and the mask of kept inputs."""
    mask = None
    if dropout > 0.0:
        rows, mask = torch.native_dropout(rows, dropout, True)
    return _narrow(rows, a.t(), scaling), mask


def _low_rank_backward(
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
        grad_b = _grad_of_b(grad_rows, down, type_b)
    up = _narrow(grad_rows, b, scaling)  # (N, r)
    if wants_a:
        assert rows is not None
        dropped = rows if mask is None else _dropped(rows, mask, dropout)
        grad_a = _product(up.t(), dropped, type_a)
    if add_to is not None:
        if mask is None:
            add_to.addmm_(up, a)
        else:
            add_to.add_(_dropped(torch.mm(up, a), mask, dropout))
    return grad_a, grad_b


def _grad_of_b(grad_rows: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of B, (out, r)."""
    if joins_products(grad_rows.device):
        return _product(grad_rows.t(), down, dtype)  # in the layout of B, so autograd makes no copy
    # As (r, out). On a CPU this product, with a long inner side, is slow with out first.
    return _product(down.t(), grad_rows, dtype).t()


def _narrow(x: Tensor, matrix: Tensor, factor: float) -> Tensor:
    """Return factor * x matrix, for a matrix of r columns.

    MKL is slow with 5 to 8 columns but not with 5 to 8 rows.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and 5 <= matrix.shape[1] <= 8:
        return _scaled(matrix.t(), x.t(), factor).t()
    return _scaled(x, matrix, factor)


def _scaled(left: Tensor, right: Tensor, factor: float, *, out: Tensor | None = None) -> Tensor:
    """Return factor * left right."""
    if not joins_products(left.device):
        return torch.mm(left, right, out=out).mul_(factor)
    # Saves a separate pass for the factor. With beta=0 the first argument is not read.
    return torch.addmm(right.select(0, 0), left, right, beta=0, alpha=factor, out=out)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of two matrices in a dtype that may be wider than their own."""
    if dtype == torch.float32 and _writes_float32(left.device.type, left.dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _writes_float32(device: str, dtype: torch.dtype) -> bool:
    """Return whether products of this dtype can be written in fp32.

    That needs CUDA and torch 2.8 or later.
    """
    if dtype == torch.float32 or torch.compiler.is_compiling():
        return False
    return device in GROUPED_ON and _try_float32(device, dtype)


@functools.lru_cache
def _try_float32(device: str, dtype: torch.dtype) -> bool:
    matrix = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(matrix, matrix, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # older torch, or a device without such products
        return False
    return True


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
