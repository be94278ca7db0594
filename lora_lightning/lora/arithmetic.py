"""Arithmetic that combines several low-rank updates of one weight into a new update.

An update is s B A, a task vector of the weight (Ilharco et al. 2023, arXiv:2212.04089). Sums of
updates are exact if the ranks may add up ("cat"). All other methods approximate at a given rank.
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
"""Largest inner dimension of a matrix for a full decomposition.

Beyond it, subspace iteration decomposes the matrix.
"""


@dataclass(frozen=True)
class Update:
    """One low-rank update with A, (r, in), B, (out, r), and the scaling s."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def dense(self) -> Tensor:
        """Return s B A as (out, in), in fp32."""
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
    """Return a new update from several updates of one weight, with scaling 1.

    * "cat" is the exact sum of w_i s_i B_i A_i. The ranks add up.
    * "svd" is the nearest update to that sum at the given rank (Eckart and Young).
    * "linear" sums A and B separately, each times sqrt(w_i s_i), as in PEFT. It is cheap but not
      a sum of updates.
    * "ties", "dare_linear" and "dare_ties" act on the dense updates, see `ties` and `dare`. The
      result is the nearest update at the given rank.

    Args:
        updates: updates of one weight. "linear" needs equal ranks.
        weights: w_i, one per update. A negative weight subtracts.
        method: one of METHODS.
        rank: rank of the new update. "cat" and "linear" ignore it.
        density: share of the entries that ties and dare keep. 0.5 by default.
        generator: random generator for the entries that dare drops. None by default.

    Raises:
        UserError: the method is unknown, or a number is out of range.
    """
    if method not in METHODS:
        raise UserError(
            f"method={method}: must be one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}"
        )
    if rank < 1 and method not in ("cat", "linear"):  # these set the rank themselves
        raise UserError(f"rank={rank}: must be at least 1.")
    if not 0 < density <= 1:
        raise UserError(f"density={density}: must be in (0, 1].")
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
        torch.manual_seed(0)  # the iteration starts from a random matrix
        return Update(*principal(merged, rank, scaling=1.0, steps=steps), 1.0)


def reduced(update: Update, rank: int) -> Update:
    """Return the nearest update of a lower rank.

    Only the small factors are used, without an (out, in) matrix.
    """
    qb, rb = torch.linalg.qr(update.scaling * update.lora_B.float())
    qa, ra = torch.linalg.qr(update.lora_A.float().t())
    u, s, vt = torch.linalg.svd(rb @ ra.t())
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    return Update(root[:, None] * (vt[:rank] @ qa.t()), qb @ u[:, :rank] * root, 1.0)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Return a matrix with only its largest entries by magnitude, and zeros elsewhere.

    `density` is the share of entries kept.
    """
    largest = delta.abs().flatten().topk(int(density * delta.numel())).indices
    result = torch.zeros_like(delta).flatten()
    result[largest] = delta.flatten()[largest]
    return result.view_as(delta)


def ties(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Merge trimmed matrices with elected signs by TIES (Yadav et al. 2023, arXiv:2306.01708).

    The sign of the sum over all matrices is the elected sign of an entry. The merged value is the
    mean of the weighted entries with that sign.
    """
    stacked = torch.stack(list(deltas))
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    factors = torch.tensor(list(weights), dtype=stacked.dtype).view(-1, 1, 1)
    return (stacked * factors * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare(delta: Tensor, density: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Drop entries at random and rescale the rest by DARE (Yu et al. 2024, arXiv:2311.03099)."""
    mask = torch.bernoulli(torch.full_like(delta, density), generator=generator)
    return delta * mask / density
