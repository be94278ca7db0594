"""Padding, masks and micro-batches."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch

from lora_lightning.data.collators import (
    PART_COST,
    MicroBatches,
    PackingCollator,
    PaddingCollator,
    _cuts,
)
from lora_lightning.tasks import IGNORE

EOS = 2
ROWS = [
    {"input_ids": [5, EOS, 7, EOS], "labels": 1},
    {"input_ids": [EOS], "labels": 0},
    {"input_ids": [8, EOS, EOS], "labels": IGNORE},
]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        (
            "right",
            [[5, 2, 7, 2], [2, 2, 2, 2], [8, 2, 2, 2]],
            [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]],
        ),
        (
            "left",
            [[5, 2, 7, 2], [2, 2, 2, 2], [2, 8, 2, 2]],
            [[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]],
        ),
    ],
)
def test_mask_goes_by_position_where_padding_is_eos(side, ids, mask):
    batch = PaddingCollator(EOS, padding_side=side)(ROWS)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert batch["labels"].tolist() == [1, 0, IGNORE]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("side", "labels", "types"),
    [
        ("right", [[IGNORE, 7, 9], [4, IGNORE, IGNORE]], [[0, 1, 1], [1, 0, 0]]),
        ("left", [[IGNORE, 7, 9], [IGNORE, IGNORE, 4]], [[0, 1, 1], [0, 0, 1]]),
    ],
)
def test_label_sequences_and_token_types_are_padded_alike(side, labels, types):
    rows = [
        {"input_ids": [6, 7, 9], "labels": [IGNORE, 7, 9], "token_type_ids": [0, 1, 1]},
        {"input_ids": [4], "labels": [4], "token_type_ids": [1]},
    ]
    batch = PaddingCollator(0, padding_side=side)(rows)
    assert batch["labels"].tolist() == labels
    assert batch["token_type_ids"].tolist() == types


def test_rows_without_labels_give_no_labels():
    assert set(PaddingCollator(0)([{"input_ids": [3, 4]}])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("limit", "lengths", "widths"),
    [(None, (3, 9), (16, 16)), (12, (3, 9), (12, 12)), (6, (3, 9), (9, 9)), (None, (5, 3), (8, 8))],
)
def test_rows_are_filled_up_to_a_multiple_within_the_models_limit(limit, lengths, widths):
    rows = rows_of(list(lengths))
    plain = PaddingCollator(0)(rows)
    wide = PaddingCollator(0, multiple=8, limit=limit)(rows)
    for name, fill in (("input_ids", 0), ("labels", IGNORE), ("attention_mask", 0)):
        width = plain[name].shape[1]
        assert torch.equal(wide[name][:, :width], plain[name])
        assert (wide[name][:, width:] == fill).all()
    assert (wide["input_ids"].shape[1], wide["labels"].shape[1]) == widths
    both = [{"input_ids": [1] * 3, "labels": [4] * 10}, {"input_ids": [1] * 9, "labels": [4]}]
    shapes = {k: v.shape[1] for k, v in PaddingCollator(0, multiple=8)(both).items()}
    assert shapes == {"input_ids": 16, "attention_mask": 16, "labels": 16}


def test_lanes_are_filled_up_to_a_multiple():
    batch = PackingCollator(9, width=13, multiple=8)(rows_of([6, 5, 4]))
    assert batch["input_ids"].shape == (2, 16)
    assert batch["bounds"].tolist() == [0, 6, 11, 16, 20, 32]
    assert batch["tokens"] == 15
    assert (batch["labels"][0, 11:] == IGNORE).all()


@pytest.mark.parametrize("collator", [PaddingCollator(0, multiple=8), PackingCollator(0, 9, 8)])
def test_micro_batches_of_rounded_rows_stay_within_the_budget(collator):
    parts = MicroBatches(collator, 32)(rows_of([9, 9, 9, 1, 1, 1, 1, 1]))
    assert all(part["input_ids"].numel() <= 32 for part in parts)
    assert all(part["input_ids"].shape[1] % 8 == 0 for part in parts)


# Micro-batches -----------------------------------------------------------------------------------


def rows_of(lengths: list[int]) -> list[dict]:
    return [
        {"input_ids": [7 + i] * length, "labels": [IGNORE] * (length - 1) + [7 + i]}
        for i, length in enumerate(lengths)
    ]


def test_micro_batches_stay_within_the_budget_and_hold_each_row_once():
    lengths = [3, 9, 4, 4, 30, 12, 1, 8]
    parts = MicroBatches(PaddingCollator(0), 24)(rows_of(lengths))
    shapes = [tuple(part["input_ids"].shape) for part in parts]
    assert shapes == [(1, 30), (1, 12), (2, 9), (4, 4)]  # the row of 30 alone, then like with like
    found = {}
    for part in parts:
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True):
            found[int(ids[0]) - 7] = int(mask.sum())
    assert found == dict(enumerate(lengths))


def test_no_other_cuts_cost_less():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        widths = sorted(torch.randint(1, 200, (9,), generator=generator).tolist(), reverse=True)

        def cost(cuts: tuple[int, ...], widths: list[int] = widths) -> float:
            """Tokens with padding and the price of each part; infinite where one is too large."""
            parts = list(pairwise(cuts))
            if any(b - a > 1 and (b - a) * widths[a] > 400 for a, b in parts):
                return math.inf
            return sum((b - a) * widths[a] + PART_COST for a, b in parts)

        every = [(0, *inner, 9) for n in range(9) for inner in combinations(range(1, 9), n)]
        assert cost(tuple(_cuts(widths, 400))) == min(map(cost, every))


def test_micro_batches_of_an_encoder_decoder_count_its_longer_side():
    rows = [{"input_ids": [1, 2], "labels": [5] * 10}, {"input_ids": [1] * 10, "labels": [5]}]
    assert len(MicroBatches(PaddingCollator(0), 19)(rows)) == 2
    assert len(MicroBatches(PaddingCollator(0), 20)(rows)) == 1


def test_micro_batches_of_packed_lanes():
    rows = rows_of([6, 5, 4, 7, 3])
    whole = PackingCollator(0, width=10)(rows)
    parts = MicroBatches(PackingCollator(0, width=10), 25)(rows)
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 10), (1, 7)]
    for name in ("input_ids", "labels", "position_ids"):
        lanes = [lane for part in parts for lane in part[name]]
        for lane, expected in zip(lanes, whole[name], strict=True):
            assert torch.equal(lane, expected[: len(lane)])
    assert [(part["rows"], part["tokens"]) for part in parts] == [(4, 18), (1, 7)]
    assert [part["bounds"].tolist() for part in parts] == [[0, 6, 10, 15, 18, 20], [0, 7]]
