"""The products of `fused_linear` for rows of several adapters in one batch.

Both functions take the rows, the frozen weight and bias, a scaling and dropout for each slot, each
slot with its rows, the random states of the slots, and A and B of all slots in turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import check_differentiated_once, low_rank_backward, project_down

_Settings = list[tuple[float, float]]
_Parts = list[tuple[int, slice]]
_Randomness = Callable[[int], AbstractContextManager[Any]]


class StackedLinear(torch.autograd.Function):
    """`fused_linear` for rows of several slots. x has N rows, and a slot has M of them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: _Settings,
        parts: _Parts,
        randomness: _Randomness,
        *matrices: Tensor,
    ) -> Tensor:
        low = [matrix.to(rows.dtype) for matrix in matrices]
        output = F.linear(rows, weight, bias)
        downs, masks = [], []
        for index, ((slot, part), (scaling, dropout)) in enumerate(
            zip(parts, settings, strict=True)
        ):
            a, b = low[2 * index : 2 * index + 2]
            with randomness(slot) if dropout > 0.0 else nullcontext():
                down, mask = project_down(rows[part], a, scaling, dropout)
            output[part].addmm_(down, b.t())
            downs.append(down)
            masks.append(mask)
        ctx.save_for_backward(rows, weight, *low, *downs, *masks)
        ctx.parts, ctx.settings = parts, settings
        ctx.types = [matrix.dtype for matrix in matrices]
        return output

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("a batch of several adapters", "use one adapter at a time")
        rows, weight, *saved = ctx.saved_tensors
        count = len(ctx.parts)
        low, downs, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        wants = ctx.needs_input_grad[6:]
        grad_x = torch.mm(grad_rows, weight) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for index, ((_, part), (scaling, dropout)) in enumerate(
            zip(ctx.parts, ctx.settings, strict=True)
        ):
            a, b = low[2 * index : 2 * index + 2]
            grads += low_rank_backward(
                grad_rows[part],
                rows[part],
                masks[index],
                a,
                b,
                downs[index],
                scaling=scaling,
                dropout=dropout,
                add_to=None if grad_x is None else grad_x[part],
                wants=(wants[2 * index], wants[2 * index + 1]),
                types=(ctx.types[2 * index], ctx.types[2 * index + 1]),
            )
        return grad_x, None, None, None, None, None, *grads


class GroupedLinear(torch.autograd.Function):
    """`StackedLinear` with one batched product for all slots, padded to the highest rank.

    There are K slots with M rows each, and R is the highest rank. The padding is zeros. The sums
    are the same, but the last bits may differ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: _Settings,
        parts: _Parts,
        randomness: _Randomness,
        *matrices: Tensor,
    ) -> Tensor:
        count = len(parts)
        x = rows.view(count, -1, rows.shape[-1])  # (K, M, in)
        a = _padded(matrices[0::2], x.dtype)  # (K, R, in)
        b = _padded([matrix.t() for matrix in matrices[1::2]], x.dtype)  # (K, R, out)
        scales = _column(tuple(scaling for scaling, _ in settings), x.dtype, x.device)
        keep = _keep(x, settings, parts, randomness)
        down = torch.bmm(x if keep is None else x * keep, a.mT).mul_(scales)  # (K, M, R)
        output = F.linear(rows, weight, bias)
        output.view(count, -1, output.shape[-1]).baddbmm_(down, b)
        ctx.save_for_backward(rows, weight, a, b, down, scales, keep)
        ctx.ranks = [matrix.shape[0] for matrix in matrices[0::2]]
        ctx.types = [matrix.dtype for matrix in matrices]
        return output

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("a batch of several adapters", "use one adapter at a time")
        rows, weight, a, b, down, scales, keep = ctx.saved_tensors
        count = len(ctx.ranks)
        x = rows.view(count, -1, rows.shape[-1])
        grad = grad_rows.reshape(count, -1, grad_rows.shape[-1])
        up = torch.bmm(grad, b.mT).mul_(scales)  # (K, M, R)
        grad_a = torch.bmm(up.mT, x if keep is None else x * keep)  # (K, R, in)
        grad_b = torch.bmm(grad.mT, down)  # (K, out, R)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_rows, weight)
            wide = grad_x.view(x.shape)
            if keep is None:
                wide.baddbmm_(up, a)
            else:
                wide.addcmul_(torch.bmm(up, a), keep)
        grad_a, grad_b = grad_a.to(ctx.types[0]), grad_b.to(ctx.types[1])  # one cast for all slots
        grads: list[Tensor] = []
        for index, rank in enumerate(ctx.ranks):
            grads += [grad_a[index, :rank], grad_b[index, :, :rank]]
        typed = [
            grad.to(dtype) if wanted else None
            for grad, dtype, wanted in zip(grads, ctx.types, ctx.needs_input_grad[6:], strict=True)
        ]
        return grad_x, None, None, None, None, None, *typed


def _padded(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return matrices (r, width) as one tensor (K, R, width), padded with rows of zeros."""
    first = matrices[0]
    ranks = [matrix.shape[0] for matrix in matrices]
    shape = (len(matrices), max(ranks), first.shape[1])
    make = torch.empty if min(ranks) == max(ranks) else torch.zeros
    padded = make(shape, dtype=dtype, device=first.device)
    torch._foreach_copy_([padded[i, :rank] for i, rank in enumerate(ranks)], [*matrices])
    return padded


@functools.lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor (K, 1, 1).

    The result is cached because each copy to a GPU forces a wait.
    """
    # Evaluation may call first, and training saves the tensor for backward.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def _keep(
    x: Tensor,
    settings: _Settings,
    parts: _Parts,
    randomness: _Randomness,
) -> Tensor | None:
    """Return the dropout factors of the inputs, drawn from each slot's own generator."""
    if not any(dropout > 0.0 for _, dropout in settings):
        return None
    keep = torch.ones_like(x)
    for place, (_, dropout), (slot, _) in zip(keep, settings, parts, strict=True):
        if dropout > 0.0:
            with randomness(slot):
                place.copy_(torch.native_dropout(place, dropout, True)[0])
    return keep
