"""Batches of rows of similar length, the same in every run and in every process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lora_lightning.errors import UserError

FILLER = -1
"""Index that means "no row" in a batch. It keeps the ranks in step when rows run out."""


class LengthBucketBatchSampler(Sampler[list[int]]):
    """Sampler of batches with rows of similar length, split over the ranks.

    The shuffle of an epoch depends only on `seed` and the epoch. Rows are shuffled and cut into
    chunks of 50 global batches. Each chunk is sorted by length, and ties stay shuffled. Then the
    batches are shuffled again. Padding is therefore small, and batches are still random.

    Each row occurs once per epoch over all ranks. All ranks get the same number of batches. A rank
    without rows for a batch gets `FILLER`, which `Examples` turns into a row without a label.

    Args:
        lengths: length of each row.
        batch_size: rows per batch on one rank.
        shuffle: whether to shuffle. If not, rows come longest first, for evaluation.
        seed: seed of the shuffle, the same on all ranks (default: 0).
        num_replicas: number of ranks (default: 1).
        rank: this rank (default: 0).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.skip = 0
        """Number of batches that an iteration skips at its start."""

    @property
    def sampler(self) -> LengthBucketBatchSampler:
        """This object, because Lightning looks for `set_epoch` on a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.global_batches()[self.skip :]
        return iter([rows[self.rank :: self.num_replicas] or [FILLER] for rows in batches])

    def global_batches(self) -> list[list[int]]:
        """Return the epoch's batches of all ranks together."""
        size = self.batch_size * self.num_replicas
        count = len(self.lengths)
        if not self.shuffle:
            order = sorted(range(count), key=lambda row: -self.lengths[row])
            return [order[start : start + size] for start in range(0, count, size)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator, device="cpu").tolist()
        chunk = 50 * size
        batches: list[list[int]] = []
        for start in range(0, count, chunk):
            rows = sorted(order[start : start + chunk], key=lambda row: self.lengths[row])
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        shuffled = torch.randperm(len(batches), generator=generator, device="cpu").tolist()
        return [batches[i] for i in shuffled]


class ResumableDataLoader(DataLoader):  # type: ignore[type-arg]
    """DataLoader that can resume in the middle of an epoch.

    Lightning saves and restores its `state_dict`. The batches already trained on are skipped
    without being loaded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given = 0
        """Number of batches of this epoch yielded so far."""
        self._resume: dict[str, int] = {}

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches yielded so far, and the number of ranks.

        These ranks share the rows of the epoch.
        """
        sampler = self._batches()
        return {
            "epoch": sampler.epoch,
            "batches": self.given,
            "ranks": sampler.num_replicas,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration start after the saved batches if its epoch is the same.

        Raises:
            UserError: the number of ranks differs, so the batches would differ, or the state is
                invalid.
        """
        for name in ("epoch", "batches", "ranks"):
            count = state.get(name, 0) if isinstance(state, dict) else None
            if type(count) is not int or not 0 <= count < 2**53:
                raise UserError(
                    f"the checkpoint's data state has an invalid {name}: {count!r:.100}."
                )
        ranks = self._batches().num_replicas
        if state.get("ranks", ranks) != ranks:
            raise UserError(
                f"trainer.devices: must give {state['ranks']} processes that see different rows, "
                f"as before, and gives {ranks}. For a new run from this checkpoint: "
                "adapter=RUN_DIR/checkpoints/last.ckpt."
            )
        self._resume = state

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self._batches()
        resume, self._resume = self._resume, {}
        self.given = resume.get("batches", 0) if resume.get("epoch") == sampler.epoch else 0
        sampler.skip = self.given
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def _batches(self) -> LengthBucketBatchSampler:
        assert isinstance(self.batch_sampler, LengthBucketBatchSampler)
        return self.batch_sampler
