"""The arithmetic of LoRA: the one place that adds a low-rank product to a base output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank(
    base_output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Returns base_output + scaling * x A^T B^T.

    The scaling is applied between the two products, where the tensor is narrowest. A and B are
    cast to the dtype of x, so that fp32 adapters ride on a bf16 base.

    Args:
        base_output: (..., out), the frozen layer's output for x.
        x: (..., in), after dropout.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: alpha / r or its like.
    """
    x = x.to(base_output.dtype) if not x.is_floating_point() else x
    down = F.linear(x, lora_A.to(x.dtype)) * scaling
    return base_output + F.linear(down, lora_B.to(down.dtype)).to(base_output.dtype)


def add_low_rank_embedding(
    base_output: Tensor, ids: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """Returns base_output + scaling * A[:, ids]^T B^T.

    Args:
        base_output: (..., dim), the frozen embedding of ids.
        ids: (...), token ids.
        lora_A: (r, vocabulary).
        lora_B: (dim, r).
        scaling: alpha / r, times the embedding's own scale where it has one.
    """
    down = F.embedding(ids, lora_A.t())
    return base_output + (F.linear(down, lora_B) * scaling).to(base_output.dtype)


def low_rank_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Frobenius norm of scaling * B A, from r x r Gram matrices, without forming the product."""
    a, b = lora_A.detach().float(), lora_B.detach().float()
    squared = torch.sum((b.t() @ b) * (a @ a.t()))
    return scaling * squared.clamp_min(0.0).sqrt()
