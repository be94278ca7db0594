"""Preset target sets, found in a model by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from .config import LoraConfig
from .module_index import ModuleIndex
from .name_patterns import ALL_LINEAR, shortest_suffix
from .target_modules import match_targets

_ATTENTION = re.compile(r"(^|\.)[^.]*(attention|attn)[^.]*\.", re.IGNORECASE)
"""Pattern for modules inside one named attention, attn, self_attn, encoder_attn or similar."""
_QUERY_VALUE = re.compile(r"\b(q|v|query|value)(_|\b)|qkv|query_key_value|c_attn", re.IGNORECASE)
"""Pattern for the last name of query, value and fused query-key-value projections."""


def target_sets(model: nn.Module) -> dict[str, str | list[str]]:
    """Return common values of `LoraConfig.targets` by name, the narrowest first.

    Hu et al. 2021 (section 4.2) adapt queries and values. Dettmers et al. 2023 adapt all linear
    layers. Sets that the model lacks, and duplicates of another set, are left out.
    """
    index = ModuleIndex(model)
    linear = [match.name for match in match_targets(model, LoraConfig(), index=index)]
    attention = [name for name in linear if _ATTENTION.search(name)]
    narrow = [name for name in attention if _QUERY_VALUE.search(name.rpartition(".")[2])]
    sets: dict[str, str | list[str]] = {}
    if 0 < len(narrow) < len(attention):
        sets["query and value"] = _suffixes(index, narrow)
    if 0 < len(attention) < len(linear):
        sets["attention"] = _suffixes(index, attention)
    sets["all linear layers"] = ALL_LINEAR
    return sets


def _suffixes(index: ModuleIndex, chosen: Collection[str]) -> list[str]:
    """Return the shortest name suffixes that match these modules and no others."""
    others = [name for name in index.adaptable if name not in chosen]
    return list(dict.fromkeys(shortest_suffix(name, others) for name in chosen))
