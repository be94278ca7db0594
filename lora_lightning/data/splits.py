"""Missing validation and test splits, cut from the training rows."""

from __future__ import annotations

import json
from typing import Any

import torch

from lora_lightning.config.schema import DataConfig
from lora_lightning.errors import UserError

from .loading import SPLITS


def make_splits(
    raw: dict[str, Any], config: DataConfig, *, strata: Any = lambda rows: None
) -> dict[str, Any]:
    """Return the datasets with missing validation and test splits cut from the training rows.

    Equal rows never end up on both sides of a cut.

    Args:
        raw: datasets by split.
        config: fractions and seed.
        strata: function that returns the group of each row, or None (default). Each split gets its
            share of each group.

    Raises:
        UserError: there are too few rows to cut.
    """
    if "train" not in raw:
        return raw
    wanted = {
        split: getattr(config, f"{split}_fraction")
        for split in SPLITS[1:]
        if split not in raw and getattr(config, f"{split}_fraction") > 0
    }
    if not wanted:
        return raw
    rows = raw["train"]
    parts = _cut(rows, strata(rows), wanted, config.split_seed)
    empty = [split for split, indices in parts.items() if not indices]
    if empty:
        cut_off = [split for split in empty if split != "train"] or list(wanted)
        can_help = "train" not in empty and len(rows) > len(wanted)
        raise UserError(
            f"data.train: {len(rows)} row{'s' * (len(rows) > 1)} are too few to cut off "
            f"{' and '.join(cut_off)} data. Give "
            + " and ".join(f"data.{split}=FILE" for split in cut_off)
            + (f", or a larger data.{cut_off[0]}_fraction." if can_help else ".")
        )
    return {**raw, **{split: rows.select(indices) for split, indices in parts.items()}}


def _cut(
    rows: Any, strata: list[Any] | None, fractions: dict[str, float], seed: int
) -> dict[str, list[int]]:
    """Return row indices by split. Each stratum is dealt in random order, equal rows together."""
    twins: dict[str, list[int]] = {}
    names = sorted(name for name in rows.column_names if name.lower() not in ("id", "idx"))
    columns = rows[:]  # at once, because reading one column copies the description of all
    for index, row in enumerate(zip(*(columns[name] for name in names), strict=True)):
        content = json.dumps(dict(zip(names, row, strict=True)), sort_keys=True, default=str)
        twins.setdefault(content, []).append(index)
    groups: dict[Any, list[list[int]]] = {}
    for indices in twins.values():
        groups.setdefault(strata[indices[0]] if strata else None, []).append(indices)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[int]] = {split: [] for split in ("train", *fractions)}
    for key in sorted(groups, key=str):
        members = groups[key]
        order = torch.randperm(len(members), generator=generator, device="cpu").tolist()
        start = 0
        for split, fraction in fractions.items():
            stop = start + round(fraction * len(members))
            parts[split] += [i for m in order[start:stop] for i in members[m]]
            start = stop
        parts["train"] += [i for m in order[start:] for i in members[m]]
    return {split: sorted(indices) for split, indices in parts.items()}
