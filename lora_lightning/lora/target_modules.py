"""Selection of the modules that an adapter wraps.

The rules are PEFT's, except that every pattern must match something.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_lightning.errors import UserError, did_you_mean

from .config import ALL_LINEAR, LoraConfig, pattern_for
from .layers.fused_parts import Part, refuse_interleaved, sized
from .layers.linear import (
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    lora_class_for,
)
from .moe import expert_parameters
from .reachability import BEHIND, passed_over, read_behind


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


def match_targets(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> list[Match]:
    """Return the modules that `config` selects, in the model's order.

    Args:
        model: the model to search.
        config: the settings that select modules.
        strict: whether every single pattern must match. True by default. A loader passes False
            because it checks each tensor of its file instead.

    Raises:
        UserError: a target, exclusion, layer index or rank/alpha pattern matches nothing, or
            their combination leaves no module. The message gives the nearest names and the
            modules that could be matched.
    """
    candidates = adaptable(model)
    saved = modules_to_save(model, config.modules_to_save)
    outside = {alias for name in saved for alias in _subtree(model, name)}
    candidates = {
        name: aliases for name, aliases in candidates.items() if not outside.intersection(aliases)
    }
    if not candidates and config.targets:
        raise UserError(
            f"{type(model).__name__} has no linear or embedding layer to adapt.{_others(model)}"
        )

    if strict:
        _check_names(model, config, candidates)
    chosen = _included(model, config, candidates)
    chosen = _without_excluded(config, chosen)
    chosen = _in_layers(config, chosen, strict=strict)
    if not chosen and not config.target_parameters:
        raise UserError(
            f"lora.targets {config.targets!r} less lora.exclude {config.exclude!r} leaves no "
            f"module to adapt. {_could_be(candidates)}"
        )
    modules = dict(model.named_modules())
    matches = {
        name: _match(config, name, tuple(aliases), modules[name])
        for name, aliases in chosen.items()
    }
    fused = _split(model, config, matches, strict=strict)
    parameters = _match_parameters(model, config, outside, {*chosen})
    for option in ("rank_pattern", "alpha_pattern") if strict else ():
        _check_patterns(f"lora.{option}", getattr(config, option), (*matches, *parameters))
    return [*fused, *parameters.values()]


def _check_patterns(where: str, patterns: dict[str, Any], names: Collection[str]) -> None:
    """Raise UserError unless each pattern is the first match of some name and so takes effect."""
    acting = {pattern_for(patterns, name) for name in names}
    for pattern in patterns:
        if pattern in acting:
            continue
        hits = [name for name in names if pattern_for({pattern: 0}, name)]
        if not hits:
            raise _no_match(where, pattern, names)
        raise UserError(
            f"{where}: {pattern!r} never acts: the first pattern that matches counts, and for "
            f"{hits[0]} that is {pattern_for(patterns, hits[0])!r}. Put {pattern!r} before it, or "
            "leave it out."
        )


def _match(
    config: LoraConfig,
    key: str,
    aliases: tuple[str, ...],
    module: nn.Module,
    *,
    name: str | None = None,
    parameter: str | None = None,
) -> Match:
    """Return a match with the settings of `key`, which is also its name by default."""
    return Match(
        name or key,
        aliases,
        module,
        config.rank_of(key),
        config.alpha_of(key),
        config.scaling_of(key),
        parameter=parameter,
    )


def _split(
    model: nn.Module, config: LoraConfig, matches: dict[str, Match], *, strict: bool
) -> list[Match]:
    """Return the matches and add the parts of fused layers."""
    if strict:
        _check_patterns("lora.parts", config.parts, matches)
    found = []
    for name, match in matches.items():
        parts = config.parts_of(name)
        if parts is not None:
            where = f"lora.parts of {name}"
            rows = getattr(match.module, "out_features", getattr(match.module, "nf", None))
            if not isinstance(rows, int):
                raise UserError(f"{where}: a {type(match.module).__name__} has no parts.")
            refuse_interleaved(where, name, getattr(model, "config", None))
            match = replace(match, parts=sized(where, parts, rows))
        found.append(match)
    return found


def _match_parameters(
    model: nn.Module, config: LoraConfig, outside: set[str], chosen: set[str]
) -> dict[str, Match]:
    """Return matches for `config.target_parameters` by parameter name, in PEFT's order.

    The weight of a linear layer is adapted as the layer, which is equivalent.

    Args:
        model: the model to search.
        config: the settings that select parameters.
        outside: names of modules that are trained whole.
        chosen: names of modules that are already adapted.
    """
    if not config.target_parameters:
        return {}
    aliases: dict[int, list[str]] = {}
    for alias, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(alias)
    found: dict[str, Match] = {}
    known: dict[str, int] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}"
            known[key] = parameter.dim()
            if not name or not any(ends_with(key, p) for p in config.target_parameters):
                continue
            where = f"lora.target_parameters: {key}"
            numbers = parameter.is_floating_point() and parameter.dtype.itemsize > 1
            if parameter.dim() not in (2, 3) or not numbers:
                shape = f"{tuple(parameter.shape)}, {parameter.dtype}".replace("torch.", "")
                raise UserError(
                    f"{where} is {shape}: LoRA takes unquantised matrices, alone or for each "
                    "expert one."
                )
            if name in read_behind(model):
                raise UserError(f"{where}: {BEHIND}. An adapter there would do nothing.")
            if name in chosen or name in outside:
                how = "adapted by lora.targets" if name in chosen else "trained whole"
                raise UserError(f"{where} belongs to {name}, which is {how} already.")
            linear = leaf == "weight" and lora_class_for(module) is LoraLinear
            found[key] = _match(
                config,
                key,
                tuple(aliases[id(module)]),
                module,
                name=name if linear else None,
                parameter=None if linear else leaf,
            )
    for pattern in config.target_parameters:
        if not any(ends_with(key, pattern) for key in found):
            matrices = [key for key, dims in known.items() if dims in (2, 3)]
            experts = sorted(set(map(within_layer, expert_parameters(model))))
            told = f"Expert parameters here: {', '.join(experts)}." if experts else ""
            raise UserError(
                f"lora.target_parameters: the name {pattern!r} matches no parameter."
                f"{did_you_mean(pattern, _suffixes(matrices))} "
                f"{told or 'This model has no expert parameters: see lora.targets.'}"
            )
    return found


def within_layer(name: str) -> str:
    """Return a name without the path of its layer, for example attention.output.dense."""
    *parents, leaf = name.split(".")
    parents = ["*" if part.isdigit() else part for part in parents]
    start = parents.index("*") + 1 if "*" in parents else -1
    return ".".join([*parents[start:], leaf])


def adaptable(model: nn.Module) -> dict[str, list[str]]:
    """Return the name and all aliases of each layer that LoRA can wrap, in the model's order."""
    aliases: dict[int, list[str]] = {}
    behind = read_behind(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if name and not isinstance(module, LoraLayer) and lora_class_for(module) is not None:
            aliases.setdefault(id(module), []).append(name)
    return {names[0]: names for names in aliases.values() if not behind.intersection(names)}


def left_out(model: nn.Module, config: LoraConfig) -> dict[str, str]:
    """Return linear layers of the bare model that `all-linear` leaves out, with the reason.

    Task heads are not included. The result is empty where `config` names its targets.
    """
    if config.targets != ALL_LINEAR:
        return {}
    heads = head_modules(model)
    outside = {alias for head in heads for alias in _subtree(model, head)}
    reasons = passed_over(model, heads)
    modules = dict(model.named_modules())
    return {
        alias: reasons[alias]
        for name, aliases in adaptable(model).items()
        if lora_class_for(modules[name]) is not LoraEmbedding and not outside.intersection(aliases)
        for alias in aliases
        if alias in reasons
    }


def _others(model: nn.Module) -> str:
    """Return a message about layers that cannot be wrapped, and the alternative."""
    names = sorted(read_behind(model))
    if not names:
        kinds = {type(m).__name__ for m in model.modules() if "weight" in m._parameters}
        return f" LoRA is not for {', '.join(sorted(kinds))}." if kinds else ""
    return (
        f" Of {names[0]} {BEHIND}; lora.target_parameters=[in_proj_weight] adapts its queries, "
        "keys and values."
    )


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of a Hugging Face model's task-head modules, outside the bare base model.

    The output embedding (lm_head) is a head. If the base model has its own attribute (`bert`,
    `model`, `transformer`), every module beside it is a head too.
    """
    heads: list[str] = []
    base = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if isinstance(base, nn.Module):
        heads += [
            name
            for name, child in model.named_children()
            if child is not base and next(child.parameters(), None) is not None
        ]
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if output is not None:
        heads += [name for name, module in model.named_modules() if module is output]
    return list(dict.fromkeys(heads))


def modules_to_save(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the names of modules to train whole, from `patterns` (exact names or suffixes).

    Raises:
        UserError: a pattern matches nothing, or PEFT would confuse another module with a match.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if ends_with(name, pattern)]
        if not hits:
            raise UserError(
                f"lora.modules_to_save: {pattern!r} matches no module."
                f"{did_you_mean(pattern, _suffixes(names))} {_could_be(names)}"
            )
        found.update(dict.fromkeys(hits))
    for name in found:
        # PEFT 0.21 compares the ends of names letter by letter.
        inside = tuple(f"{one}." for one in found)
        ends = [other for other in names if other.endswith(name) and other not in found]
        taken = [other for other in ends if not other.startswith(inside)]
        if taken:
            raise UserError(
                f"lora.modules_to_save: {name} cannot be stored without {taken[0]}, whose name "
                "ends in the same letters: PEFT takes one for the other. Train both: "
                f"lora.modules_to_save=[{','.join([*found, *taken])}]."
            )
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def shortest_suffix(name: str, others: Iterable[str], *, minimum: int = 1) -> str:
    """Return the shortest dotted suffix of `name` that no name in `others` ends with.

    If there is none, return `name`.
    """
    parts = name.split(".")
    others = list(others)
    for length in range(minimum, len(parts)):
        suffix = ".".join(parts[-length:])
        if not any(ends_with(other, suffix) for other in others):
            return suffix
    return name


def _included(
    model: nn.Module, config: LoraConfig, candidates: dict[str, list[str]]
) -> dict[str, list[str]]:
    modules = dict(model.named_modules())
    if config.targets == ALL_LINEAR:
        heads = {alias for head in head_modules(model) for alias in _subtree(model, head)}
        heads.update(left_out(model, config))
        return {
            name: aliases
            for name, aliases in candidates.items()
            if lora_class_for(modules[name]) is not LoraEmbedding
            and not heads.intersection(aliases)
        }
    return {
        name: aliases
        for name, aliases in candidates.items()
        if any(_matches(alias, config.targets) for alias in aliases)
    }


def _without_excluded(config: LoraConfig, chosen: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        name: aliases
        for name, aliases in chosen.items()
        if not any(_matches(alias, config.exclude) for alias in aliases)
    }


def _matches(name: str, patterns: str | list[str]) -> bool:
    """Return whether a regex matches all of `name`, or a suffix in a list matches its end."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(ends_with(name, pattern) for pattern in patterns)


def _check_names(model: nn.Module, config: LoraConfig, candidates: dict[str, list[str]]) -> None:
    """Raise UserError unless each pattern in targets and exclude matches something."""
    known = [alias for aliases in candidates.values() for alias in aliases]
    for option, patterns in (("targets", config.targets), ("exclude", config.exclude)):
        if option == "targets" and patterns == ALL_LINEAR:
            continue
        what, each = ("regex", [patterns]) if isinstance(patterns, str) else ("name", patterns)
        for pattern in each:
            one = pattern if what == "regex" else [pattern]
            if any(_matches(name, one) for name in known):
                continue
            for name, module in model.named_modules():
                if name and _matches(name, one):
                    why = "which LoRA cannot wrap or which is trained whole."
                    if name in read_behind(model):
                        why = f"and {BEHIND}: an adapter there would do nothing."
                    raise UserError(
                        f"lora.{option}: {pattern!r} is {name!r}, a {type(module).__name__}, {why} "
                        f"{_could_be(known)}"
                    )
            raise _no_match(f"lora.{option}", pattern, known, what=what)


def _in_layers(
    config: LoraConfig, chosen: dict[str, list[str]], *, strict: bool
) -> dict[str, list[str]]:
    if config.layers is None:
        return chosen
    lists = list(config.layers_pattern or [r"[^.]*"])
    indices: dict[str, int] = {}
    unmatched = set(lists)
    for name in chosen:
        for pattern in lists:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
            if found:
                indices[name] = int(found.group(1))
                unmatched.discard(pattern)
                break
    if strict and config.layers_pattern and unmatched:
        pattern = min(unmatched)
        known = {list_name for name in chosen for list_name in re.findall(r"([^.]+)\.\d+\.", name)}
        raise UserError(
            f"lora.layers_pattern: {pattern!r} names no module list around the targets."
            f"{did_you_mean(pattern, known)} Lists that could be named: {', '.join(sorted(known))}."
        )
    present = sorted(set(indices.values()))
    missing = [layer for layer in config.layers if layer not in present]
    if strict and missing:
        have = f"{present[0]} to {present[-1]}" if present else "none: the names hold no index"
        raise UserError(
            f"lora.layers: no adapted module lies in layer {', '.join(map(str, missing))}. "
            f"Layers that could be named: {have}."
        )
    return {name: chosen[name] for name in chosen if indices.get(name) in config.layers}


def _subtree(model: nn.Module, name: str) -> list[str]:
    """Return all names of `name` and the modules below it, including aliases."""
    inside = {id(module) for module in model.get_submodule(name).modules()}
    return [n for n, m in model.named_modules(remove_duplicate=False) if id(m) in inside]


def ends_with(name: str, suffix: str) -> bool:
    """Return whether `name` is `suffix`, or ends with it after a dot."""
    return name == suffix or name.endswith(f".{suffix}")


def _suffixes(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[start:]) for start in range(len(parts)))
    return found


def _could_be(candidates: Iterable[str]) -> str:
    counts = Counter(name.rsplit(".", 1)[-1] for name in candidates)
    # The last name of a numbered module, as in nn.Sequential, is its number.
    listed = ", ".join(f"{leaf} (x{count})" for leaf, count in [*counts.items()][:30])
    return f"Modules that could be matched, by last name: {listed or 'none'}."


def _no_match(
    where: str, pattern: str, candidates: Iterable[str], *, what: str = "name"
) -> UserError:
    names = list(candidates)
    hint = did_you_mean(pattern, _suffixes(names))
    return UserError(f"{where}: the {what} {pattern!r} matches no module.{hint} {_could_be(names)}")
