"""Padding and masks."""

from __future__ import annotations

import pytest
import torch

from lora_lightning.data.collate import PaddingCollator
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
