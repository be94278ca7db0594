"""Arithmetic of updates: several low-rank updates of one weight as a new one.

An update is s B A, a task vector of the weight (Ilharco et al. 2023, arXiv:2212.04089). Sums of
them are exact where the ranks may add up ("cat"); all else approximates, at a rank that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import UserError, did_you_mean

from .initialization.svd import principal

METHODS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties")
SMALL = 1024
"""Up to this inner dimension a matrix is decomposed whole; beyond it by subspace iteration."""


@dataclass(frozen=True)
class Update:
    """One low-rank update: A, (r, in), B, (out, r), and the scaling s."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def dense(self) -> Tensor:
        """S B A as (out, in), in fp32."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())


def combine(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    method: str,
    rank: int,
    density: float = 0.5,
    generator: torch.Generator | None = None,
) -> Update:
    """A new update from several of one weight; its scaling is 1.

    "cat": the sum of w_i s_i B_i A_i, exactly, of all ranks together. "svd": the nearest to that
    sum of the rank that is given (Eckart and Young). "linear": A and B summed each for itself, each
    with sqrt(w_i s_i), as PEFT does it: cheap, and no sum of updates. "ties", "dare_linear" and
    "dare_ties": see `ties` and `dare`, on the updates themselves, and the nearest of that rank.

    Args:
        updates: of one weight; "linear" wants equal ranks.
        weights: w_i, as many; below zero to subtract.
        method: one of METHODS.
        rank: of the new update; "cat" and "linear" have their own.
        density: share of the entries that ties and dare keep.
        generator: for what dare drops.

    Raises:
        UserError: there is no such method, or a number is out of range.
    """
    if method not in METHODS:
        raise UserError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}."
            f"{did_you_mean(method, METHODS)}"
        )
    if rank < 1 and method not in ("cat", "linear"):  # which have their own
        raise UserError(f"rank must be at least 1, got {rank}.")
    if not 0 < density <= 1:
        raise UserError(f"density must be in (0, 1], got {density}.")
    if method == "linear":
        roots = [abs(w * u.scaling) ** 0.5 for w, u in zip(weights, updates, strict=True)]
        signs = [-1.0 if w * u.scaling < 0 else 1.0 for w, u in zip(weights, updates, strict=True)]
        a = [r * s * u.lora_A.float() for r, s, u in zip(roots, signs, updates, strict=True)]
        b = [r * u.lora_B.float() for r, u in zip(roots, updates, strict=True)]
        return Update(torch.stack(a).sum(0), torch.stack(b).sum(0), 1.0)
    if method in ("cat", "svd"):
        exact = Update(
            torch.cat([u.lora_A.float() for u in updates]),
            torch.cat(
                [w * u.scaling * u.lora_B.float() for w, u in zip(weights, updates, strict=True)],
                dim=1,
            ),
            1.0,
        )
        return exact if method == "cat" else reduced(exact, rank)
    deltas = [update.dense() for update in updates]
    if method.startswith("dare"):
        deltas = [dare(delta, density, generator=generator) for delta in deltas]
    elif method == "ties":
        deltas = [trimmed(delta, density) for delta in deltas]
    if method == "dare_linear":
        merged = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).sum(0)
    else:
        merged = ties(deltas, weights)
    rank = min(rank, *merged.shape)
    steps = None if min(merged.shape) <= SMALL else 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the iteration begins with a random matrix
        return Update(*principal(merged, rank, scaling=1.0, steps=steps), 1.0)


def reduced(update: Update, rank: int) -> Update:
    """The nearest update of a lower rank, from the small factors alone: no (out, in) matrix."""
    qb, rb = torch.linalg.qr(update.scaling * update.lora_B.float())
    qa, ra = torch.linalg.qr(update.lora_A.float().t())
    u, s, vt = torch.linalg.svd(rb @ ra.t())
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    return Update(root[:, None] * (vt[:rank] @ qa.t()), qb @ u[:, :rank] * root, 1.0)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The share `density` of a matrix's entries that are largest by magnitude, else zeros."""
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    result = torch.zeros_like(delta).flatten()
    result[kept] = delta.flatten()[kept]
    return result.view_as(delta)


def ties(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv:2306.01708) of trimmed matrices: elect signs, merge the rest.

    The sign of an entry is that of the sum of all; its value the mean of those, times their
    weights, that have the sign.
    """
    stacked = torch.stack(list(deltas))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    factors = torch.tensor(list(weights), dtype=stacked.dtype).view(-1, 1, 1)
    return (stacked * factors * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare(delta: Tensor, density: float, *, generator: torch.Generator | None = None) -> Tensor:
    """DARE (Yu et al. 2024, arXiv:2311.03099): drop entries at random and rescale the rest."""
    kept = torch.bernoulli(torch.full_like(delta, density), generator=generator)
    return delta * kept / density
