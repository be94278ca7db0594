"""The batch sampler and the data loader that goes on in mid-epoch."""

from __future__ import annotations

import math
import os
from collections import Counter
from itertools import islice

import pytest
import torch

from lora_lightning.data.sampler import FILLER, LengthBucketBatchSampler, ResumableDataLoader

WORLDS = (1, 2, 3, 5)


def _lengths(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 120, (count,), generator=generator).tolist()


def _ranks(count: int, world: int, *, shuffle: bool, epoch: int = 0) -> list[list[list[int]]]:
    samplers = [
        LengthBucketBatchSampler(
            _lengths(count), 4, shuffle=shuffle, seed=7, num_replicas=world, rank=rank
        )
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 19, 20, 21, 1003])
@pytest.mark.parametrize("world", WORLDS)
def test_each_row_once_and_ranks_in_step(world, count, shuffle):
    ranks = _ranks(count, world, shuffle=shuffle)
    seen = Counter(row for batches in ranks for batch in batches for row in batch if row != FILLER)
    assert seen == Counter(range(count))
    assert {len(batches) for batches in ranks} == {math.ceil(count / (4 * world))}
    assert all(1 <= len(batch) <= 4 for batches in ranks for batch in batches)
    for batches in ranks:  # a filler stands alone, never beside rows
        assert all(FILLER not in batch or batch == [FILLER] for batch in batches)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_share_the_batches_of_one_larger_process(world):
    """Step by step, all ranks together see the rows of one process with a larger batch."""
    whole = LengthBucketBatchSampler(_lengths(203), 4 * world, shuffle=True, seed=7)
    ranks = _ranks(203, world, shuffle=True)
    for step, batch in enumerate(whole):
        together = [row for batches in ranks for row in batches[step] if row != FILLER]
        assert sorted(together) == sorted(batch)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBucketBatchSampler(_lengths(300), 8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(3, 1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert order(3, 1) == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    orders = [order(3, 0), order(3, 1), order(4, 0), order(4, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_iterating_twice_gives_the_same_epoch():
    sampler = LengthBucketBatchSampler(_lengths(100), 8, shuffle=True, seed=0)
    assert list(sampler) == list(sampler)


def test_buckets_pad_far_less_than_random_batches():
    lengths = _lengths(4000)

    def padding(batches: list[list[int]]) -> int:
        longest = (max(lengths[row] for row in batch) * len(batch) for batch in batches)
        return sum(longest) - sum(lengths)

    bucketed = list(LengthBucketBatchSampler(lengths, 16, shuffle=True, seed=0))
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0)).tolist()
    random = [order[start : start + 16] for start in range(0, 4000, 16)]
    assert padding(bucketed) < 0.1 * padding(random)


def test_batches_are_not_sorted_by_length():
    lengths = _lengths(4000)
    means = [
        sum(lengths[row] for row in batch) / len(batch)
        for batch in LengthBucketBatchSampler(lengths, 16, shuffle=True, seed=0)
    ]
    ranks = torch.tensor(means).argsort().argsort().float()
    steps = torch.arange(len(means)).float()
    assert abs(torch.corrcoef(torch.stack([ranks, steps]))[0, 1]) < 0.2


def test_evaluation_takes_the_longest_rows_first():
    lengths = _lengths(50)
    order = [row for batch in LengthBucketBatchSampler(lengths, 8, shuffle=False) for row in batch]
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)


def _loader(workers: int) -> ResumableDataLoader:
    sampler = LengthBucketBatchSampler(_lengths(45), 4, shuffle=True, seed=5)
    return ResumableDataLoader(
        range(45), batch_sampler=sampler, collate_fn=list, num_workers=workers
    )


@pytest.mark.parametrize(("done", "workers"), [(0, 0), (1, 0), (7, 0), (12, 0), (7, 2)])
def test_loader_goes_on_after_the_batches_given(done, workers):
    whole = _loader(workers)
    whole.batch_sampler.set_epoch(2)
    expected = list(whole)

    stopped = _loader(workers)
    stopped.batch_sampler.set_epoch(2)
    iterator = iter(stopped)
    for _ in range(done):
        next(iterator)
    state = stopped.state_dict()

    resumed = _loader(workers)
    resumed.load_state_dict(state)
    resumed.batch_sampler.set_epoch(2)
    assert list(resumed) == expected[done:]
    assert resumed.state_dict() == {"epoch": 2, "batches": 12, "ranks": 1}
    resumed.batch_sampler.set_epoch(3)
    whole.batch_sampler.set_epoch(3)
    assert list(resumed) == list(whole), "the epoch after is whole again"


def test_workers_stay_for_the_next_epoch_and_after_one_that_was_left():
    sampler = LengthBucketBatchSampler(_lengths(45), 4, shuffle=True, seed=5)
    loader = ResumableDataLoader(
        range(45),
        batch_sampler=sampler,
        collate_fn=lambda rows: (os.getpid(), rows),
        num_workers=2,
        persistent_workers=True,
    )
    loader.load_state_dict({"epoch": 0, "batches": 7})
    workers, found = set(), []
    for epoch, most in ((0, 99), (1, 3), (2, 99), (2, 99)):
        sampler.set_epoch(epoch)
        given = list(islice(loader, most))
        workers |= {worker for worker, _ in given}
        found.append([rows for _, rows in given])
    expected = []
    for epoch in (0, 1, 2):
        whole = _loader(0)
        whole.batch_sampler.set_epoch(epoch)
        expected.append(list(whole))
    assert found == [expected[0][7:], expected[1][:3], expected[2], expected[2]]
    assert len(workers) == 2
    assert os.getpid() not in workers


def test_state_of_an_earlier_epoch_skips_nothing():
    loader = _loader(0)
    loader.load_state_dict({"epoch": 0, "batches": 5})
    loader.batch_sampler.set_epoch(1)
    assert len(list(loader)) == 12


def test_skipped_rows_are_not_loaded():
    class Recorder:
        loaded: list[int] = []

        def __len__(self) -> int:
            return 45

        def __getitem__(self, index: int) -> int:
            self.loaded.append(index)
            return index

    sampler = LengthBucketBatchSampler(_lengths(45), 4, shuffle=True, seed=5)
    loader = ResumableDataLoader(Recorder(), batch_sampler=sampler, collate_fn=list)
    loader.load_state_dict({"epoch": 0, "batches": 10})
    rest = list(loader)
    assert Recorder.loaded == [row for batch in rest for row in batch]
    assert len(rest) == 2
