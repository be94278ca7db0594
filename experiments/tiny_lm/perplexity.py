r"""Perplexity of held-back docstrings: the tiny language model, a unigram and a 5-gram baseline.

    python perplexity.py work ../../lora_lightning/data/embedded/tiny_lm

All three see the same tokens. Each docstring is scored by itself, from the token after BOS to EOS;
one that is longer than the model's 512 positions in pieces, without what went before (the
baselines see it whole). The baselines are trained on the whole training part, of which the model
saw a share. The 5-gram model is smoothed by interpolated Kneser-Ney (Chen and Goodman 1999) with
one discount an order.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

ORDER = 5
BITS = 12  # of a token: five of them make one int64
BOS = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="the folder that pretrain.py filled")
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    train, heldout = (np.load(arguments.work / f"{name}.npy") for name in ("train", "heldout"))
    print(f"{len(documents(heldout)):,} held-back docstrings, "
          f"{np.count_nonzero(heldout != BOS):,} tokens scored")  # fmt: skip
    print(f"unigram       {math.exp(unigram_loss(train, heldout)):8.2f}")
    print(f"5-gram        {math.exp(ngram_loss(train, heldout)):8.2f}")
    print(f"tiny_lm       {math.exp(model_loss(arguments.model, heldout)):8.2f}")


def documents(tokens: np.ndarray) -> list[np.ndarray]:
    """The documents of an array, each BOS text EOS."""
    return np.split(tokens, np.flatnonzero(tokens == BOS)[1:])


def unigram_loss(train: np.ndarray, heldout: np.ndarray) -> float:
    """Mean loss per token, in nats, with one added to each count."""
    counts = np.bincount(train, minlength=2**BITS) + 1.0
    counts[BOS] = 0
    return float(-np.log(counts / counts.sum(), where=counts > 0)[heldout[heldout != BOS]].mean())


def ngram_loss(train: np.ndarray, heldout: np.ndarray) -> float:
    """Mean loss per token, in nats, of the interpolated 5-gram model."""
    # From the longest order down: counts of n-grams, then of the n-grams that precede each other.
    grams, counts = np.unique(codes(train), return_counts=True)
    tables = [(grams, counts)]
    for order in range(ORDER - 1, 0, -1):
        shorter = np.sort(tables[-1][0] & ((1 << BITS * order) - 1))
        tables.append(np.unique(shorter, return_counts=True))
    wanted = codes(heldout)
    probability = np.full(len(wanted), 2.0**-BITS)
    for order, (grams, counts) in zip(range(1, ORDER + 1), reversed(tables), strict=True):
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice)
        heads, starts = np.unique(grams >> BITS, return_index=True)
        totals = np.add.reduceat(counts, starts)
        kinds = np.diff(np.append(starts, len(grams)))
        asked = wanted & ((1 << BITS * order) - 1)
        head, known = find(heads, asked >> BITS)
        gram, seen = find(grams, asked)
        numerator = np.where(seen, counts[gram] - discount, 0.0)
        rest = discount * kinds[head] * probability
        probability = np.where(known, (numerator + rest) / totals[head], probability)
    return float(-np.log(probability).mean())


def codes(tokens: np.ndarray) -> np.ndarray:
    """Each token but BOS together with the four before it, as one number; BOS fills what lacks."""
    document = np.cumsum(tokens == BOS)
    found = tokens.astype(np.int64)
    for back in range(1, ORDER):
        before = np.zeros_like(found)
        same = document[back:] == document[:-back]
        before[back:] = np.where(same, tokens[:-back], BOS)
        found |= before << BITS * back
    return found[tokens != BOS]


def find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of values in a sorted table (any place where absent), and whether they are there."""
    place = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return place, table[place] == values


@torch.inference_mode()
def model_loss(folder: Path, heldout: np.ndarray) -> float:
    """Mean loss per token, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    limit = model.config.max_position_embeddings
    pieces = []
    for document in documents(heldout):
        ids = document.astype(np.int64)
        pieces += [ids[start : start + limit] for start in range(0, len(ids) - 1, limit - 1)]
    pieces.sort(key=len)
    total, count = 0.0, 0
    for start in range(0, len(pieces), 64):
        rows = [torch.from_numpy(piece) for piece in pieces[start : start + 64]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)[:, 1:]
        logits = model(ids[:, :-1]).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


if __name__ == "__main__":
    main()
