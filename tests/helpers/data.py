"""Words and rows that tiny models learn, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

WORDS = (
    "the a film food hotel was is very not never good bad fine poor lovely awful slow quick warm "
    "cold and but service staff room story price cheap dear clean dirty again return would loved "
    "hated enjoyed waste time money boring funny sad happy tasty bland . ! , ?"
).split()


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of random words and of random length, whose middle word decides the label."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    rows = []
    for index in range(count):
        label = ("negative", "positive")[index % 2]
        length = 3 + int(torch.randint(15, (1,), generator=generator))
        words = [pick(WORDS[:10]) for _ in range(length)]
        words[length // 2] = pick(
            ["lovely", "loved", "tasty"] if label == "positive" else ["awful", "hated", "bland"]
        )
        rows.append({"text": " ".join(words), "label": label})
    return rows


def to_jsonl(rows: Iterable[object]) -> str:
    """Return rows as JSON, one a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """Write rows as JSON lines; return the path."""
    path.write_text(to_jsonl(rows))
    return path
