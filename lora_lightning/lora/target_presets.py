"""Sets of targets to choose among, found in a model by what its modules are called."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from .config import ALL_LINEAR, LoraConfig
from .target_modules import adaptable, match_targets, shortest_suffix

_ATTENTION = re.compile(r"(^|\.)[^.]*(attention|attn)[^.]*\.", re.IGNORECASE)
"""A module within one that models call attention or attn, self_attn, encoder_attn ..."""
_QUERY_VALUE = re.compile(r"\b(q|v|query|value)(_|\b)|qkv|query_key_value|c_attn", re.IGNORECASE)
"""Last name of a projection to queries or values, or to all three at once."""


def target_sets(model: nn.Module) -> dict[str, str | list[str]]:
    """What one adapts by habit, as `LoraConfig.targets` takes it, by name; the narrowest first.

    Queries and values are the choice of Hu et al. 2021 (section 4.2), all linear layers that of
    Dettmers et al. 2023. A set that the model does not have, or that is another one, is left out.
    """
    linear = [match.name for match in match_targets(model, LoraConfig())]
    attention = [name for name in linear if _ATTENTION.search(name)]
    narrow = [name for name in attention if _QUERY_VALUE.search(name.rpartition(".")[2])]
    sets: dict[str, str | list[str]] = {}
    if 0 < len(narrow) < len(attention):
        sets["query and value"] = _suffixes(model, narrow)
    if 0 < len(attention) < len(linear):
        sets["attention"] = _suffixes(model, attention)
    sets["all linear layers"] = ALL_LINEAR
    return sets


def _suffixes(model: nn.Module, chosen: Collection[str]) -> list[str]:
    """The shortest ends of names that mean these modules and no others."""
    others = [name for name in adaptable(model) if name not in chosen]
    return list(dict.fromkeys(shortest_suffix(name, others) for name in chosen))
