"""Selection of the modules that an adapter wraps.

The rules are PEFT's, except that every pattern must match something.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_lightning.errors import UserError, did_you_mean

from .config import LoraConfig
from .layers.factory import lora_class_for
from .layers.fused_parts import Part, check_contiguous, with_sizes
from .layers.linear import LoraLinear
from .module_index import ModuleIndex, listing, no_match
from .moe import expert_parameters
from .name_patterns import ends_with, pattern_for, suffixes, within_layer
from .reachability import BEHIND


@dataclass(frozen=True)
class Match:
    """A weight to adapt. Its module has one name, or several where it is shared."""

    name: str
    """First name of the module, or name of the parameter."""
    aliases: tuple[str, ...]
    """All names of the module."""
    module: nn.Module
    rank: int
    alpha: float
    scaling: float
    parts: tuple[Part, ...] | None = None
    """Parts of a fused layer, with their sizes."""
    parameter: str | None = None
    """Name of the parameter in the module, if the parameter itself is adapted."""


def match_targets(
    model: nn.Module,
    config: LoraConfig,
    *,
    strict: bool = True,
    index: ModuleIndex | None = None,
) -> list[Match]:
    """Return the modules that `config` selects, in the model's order.

    Args:
        model: the model to search.
        config: the settings that select modules.
        strict: whether every single pattern must match. True by default. A loader passes False
            because it checks each tensor of its file instead.
        index: the model's index, with `config.modules_to_save`. None by default, which builds it.

    Raises:
        UserError: a target, exclusion, layer index or rank/alpha pattern matches nothing, or
            their combination leaves no module. The message gives the nearest names and the
            modules that can be matched.
    """
    index = index or ModuleIndex(model, config.modules_to_save)
    if config.targets and not index.layers:
        raise index.no_layers()
    targets = index.select(config.targets, setting="lora.targets" if strict else "")
    excluded = index.select(config.exclude, setting="lora.exclude" if strict else "")
    names = [name for name in index.layers if name in targets - excluded]
    names = _in_layers(config, names, strict=strict)
    if not names and not config.target_parameters:
        raise UserError(
            f"lora.targets={config.targets!r} without lora.exclude={config.exclude!r} leaves no "
            f"module to adapt. {listing(index.layers)}"
        )
    matches = {name: _match(index, config, name, name) for name in names}
    parameters = _match_parameters(index, config, {*names})
    if strict:
        _check_patterns("lora.parts", config.parts, matches)
        for option in ("rank_pattern", "alpha_pattern"):
            _check_patterns(f"lora.{option}", getattr(config, option), (*matches, *parameters))
    return [*(_with_parts(model, config, m) for m in matches.values()), *parameters.values()]


def _match(
    index: ModuleIndex, config: LoraConfig, name: str, key: str, parameter: str | None = None
) -> Match:
    """Return a match of the module `name`, with the settings of `key`."""
    return Match(
        key if parameter else name,
        tuple(index.aliases[name]),
        index.modules[name],
        config.rank_of(key),
        config.alpha_of(key),
        config.scaling_of(key),
        parameter=parameter,
    )


def _check_patterns(setting: str, patterns: dict[str, Any], names: Collection[str]) -> None:
    """Raise UserError unless each pattern is the first match of some name and so takes effect."""
    effective = {pattern_for(patterns, name) for name in names}
    for pattern in patterns:
        if pattern in effective:
            continue
        hits = [name for name in names if pattern_for([pattern], name)]
        if not hits:
            raise no_match(setting, pattern, names)
        raise UserError(
            f"{setting}: {pattern!r} has no effect, since {pattern_for(patterns, hits[0])!r} "
            f"matches {hits[0]} first. Put {pattern!r} before it, or remove it."
        )


def _with_parts(model: nn.Module, config: LoraConfig, match: Match) -> Match:
    """Return the match of a fused layer with its parts, and any other match unchanged."""
    parts = config.parts_of(match.name)
    if parts is None:
        return match
    where = f"lora.parts of {match.name}"
    rows = getattr(match.module, "out_features", getattr(match.module, "nf", None))
    if not isinstance(rows, int):
        raise UserError(f"{where}: a {type(match.module).__name__} has no parts.")
    check_contiguous(where, match.name, getattr(model, "config", None))
    return replace(match, parts=with_sizes(where, parts, rows))


def _in_layers(config: LoraConfig, names: list[str], *, strict: bool) -> list[str]:
    """Return the names in the layers that `config.layers` lists."""
    if config.layers is None:
        return names
    lists = list(config.layers_pattern or [r"[^.]*"])
    layers: dict[str, int] = {}
    unmatched = set(lists)
    for name in names:
        for pattern in lists:
            if hit := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
                layers[name] = int(hit.group(1))
                unmatched.discard(pattern)
                break
    present = sorted(set(layers.values()))
    if strict and config.layers_pattern and unmatched:
        raise _no_list(min(unmatched), names)
    if strict and not set(config.layers).issubset(present):
        missing = ", ".join(str(layer) for layer in config.layers if layer not in present)
        known = f"{present[0]} to {present[-1]}" if present else "none, since no name has an index"
        raise UserError(
            f"lora.layers: no adapted module is in layer {missing}. "
            f"Layers that can be listed: {known}."
        )
    return [name for name in names if layers.get(name) in config.layers]


def _no_list(pattern: str, names: Collection[str]) -> UserError:
    known = {list_name for name in names for list_name in re.findall(r"([^.]+)\.\d+\.", name)}
    return UserError(
        f"lora.layers_pattern: {pattern!r} matches no module list around the targets."
        f"{did_you_mean(pattern, known)} Lists that can be matched: {', '.join(sorted(known))}."
    )


def _match_parameters(
    index: ModuleIndex, config: LoraConfig, adapted: set[str]
) -> dict[str, Match]:
    """Return matches for `config.target_parameters` by parameter name, in PEFT's order.

    The weight of a linear layer is adapted as the layer, which is equivalent.

    Args:
        index: the model's index.
        config: the settings that select parameters.
        adapted: names of modules that are already adapted.
    """
    if not config.target_parameters:
        return {}
    saved = index.below(index.saved)
    known: dict[str, nn.Parameter] = {}
    matches: dict[str, Match] = {}
    for name in index.aliases:
        module = index.modules[name]
        for leaf, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}"
            known[key] = parameter
            if not name or not any(ends_with(key, p) for p in config.target_parameters):
                continue
            where = f"lora.target_parameters: {key}"
            _check_matrix(where, parameter)
            if name in index.behind:
                raise UserError(f"{where}: {BEHIND}, so an adapter would have no effect.")
            if name in adapted or name in saved:
                how = "adapted by lora.targets" if name in adapted else "trained whole"
                raise UserError(f"{where} is part of {name}, which is already {how}.")
            is_linear = leaf == "weight" and lora_class_for(module) is LoraLinear
            matches[key] = _match(index, config, name, key, None if is_linear else leaf)
    for pattern in config.target_parameters:
        if not any(ends_with(key, pattern) for key in matches):
            raise _no_parameter(pattern, index, known)
    return matches


def _check_matrix(where: str, parameter: nn.Parameter) -> None:
    """Raise UserError for a parameter that is neither a matrix nor a stack of matrices."""
    is_dense = parameter.is_floating_point() and parameter.dtype.itemsize > 1
    if parameter.dim() not in (2, 3) or not is_dense:
        shape = f"{tuple(parameter.shape)}, {parameter.dtype}".replace("torch.", "")
        raise UserError(f"{where} is {shape}: must be an unquantized matrix, or one per expert.")


def _no_parameter(pattern: str, index: ModuleIndex, known: dict[str, nn.Parameter]) -> UserError:
    matrices = [key for key, parameter in known.items() if parameter.dim() in (2, 3)]
    experts = sorted(set(map(within_layer, expert_parameters(index.model))))
    hint = "This model has no expert parameters: set lora.targets."
    if experts:
        hint = f"Expert parameters of this model: {', '.join(experts)}."
    return UserError(
        f"lora.target_parameters: {pattern!r} matches no parameter."
        f"{did_you_mean(pattern, suffixes(matrices))} {hint}"
    )
