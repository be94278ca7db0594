"""Initial values of A and B that are parts of the frozen weight W, (out, in).

PiSSA trains the directions in which W is largest. OLoRA trains the directions of an orthonormal
basis of W. Both start with s B A as a part of W, so this part must be subtracted again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.errors import UserError


@torch.no_grad()
def initial_matrices(
    name: str, weight: Tensor, rank: int, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the initial A, (r, in), and B, (out, r), in fp32.

    Args:
        name: "pissa", "pissa_niter_N" or "olora".
        weight: the frozen weight, (out, in).
        rank: r.
        scaling: s.

    Raises:
        UserError: the weight has fewer rows or columns than r.
    """
    if name in ("eva", "loftq"):
        raise UserError(
            f"lora.init={name}: requires training data or the unquantized weights. Train with "
            "LoraModule, or set lora.init=kaiming."
        )
    if rank > min(weight.shape):
        out, fan_in = weight.shape
        raise UserError(
            f"lora.rank={rank}: not supported with lora.init={name} on a weight of {out} x "
            f"{fan_in}. Set a lower lora.rank, or lora.init=kaiming."
        )
    if name == "olora":
        return orthonormal(weight.float(), rank)
    _, _, steps = name.partition("_niter_")
    return principal(weight.float(), rank, scaling=scaling, steps=int(steps) if steps else None)


def principal(
    weight: Tensor, rank: int, *, scaling: float, steps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return A and B of PiSSA, where W = U S V^T and s B A = U_r S_r V_r^T.

    Meng et al. 2024, arXiv:2404.02948. B is U_r sqrt(S_r / s), and A is sqrt(S_r / s) V_r^T.

    Args:
        weight: the frozen weight, (out, in).
        rank: r.
        scaling: s.
        steps: number of subspace iterations that replace the full decomposition. 4 come close to
            it. None by default, for the full decomposition.
    """
    if steps is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, min(rank + 8, *weight.shape), niter=steps)
        vt = v.t()
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def orthonormal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of OLoRA, where W = Q R, B is Q_r (orthonormal) and A is R_r.

    Buyukakyuz 2024, arXiv:2406.01775.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()
