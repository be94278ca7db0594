"""Matrix products of low rank, computed the fastest way for their device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

GROUPED_ON = ("cuda",)
"""Device types on which the launch of a product costs more than its size."""


def joins_products(device: torch.device) -> bool:
    """Return whether one large product is faster than several small ones."""
    return device.type in GROUPED_ON


def grad_of_b(grad_rows: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of B, (out, r)."""
    if joins_products(grad_rows.device):
        return wide_product(
            grad_rows.t(), down, dtype
        )  # in the layout of B, so autograd makes no copy
    # As (r, out). On a CPU this product, with a long inner side, is slow with out first.
    return wide_product(down.t(), grad_rows, dtype).t()


def narrow(x: Tensor, matrix: Tensor, factor: float) -> Tensor:
    """Return factor * x matrix, for a matrix of r columns.

    MKL is slow with 5 to 8 columns but not with 5 to 8 rows.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and 5 <= matrix.shape[1] <= 8:
        return scaled(matrix.t(), x.t(), factor).t()
    return scaled(x, matrix, factor)


def scaled(left: Tensor, right: Tensor, factor: float, *, out: Tensor | None = None) -> Tensor:
    """Return factor * left right."""
    if not joins_products(left.device):
        return torch.mm(left, right, out=out).mul_(factor)
    # Saves a separate pass for the factor. With beta=0 the first argument is not read.
    return torch.addmm(right.select(0, 0), left, right, beta=0, alpha=factor, out=out)


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
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
