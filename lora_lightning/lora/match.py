"""Which modules of a model an adapter goes on: PEFT's rules, but no pattern may match nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .config import ALL_LINEAR, LoraConfig, pattern_for
from .errors import UserError, did_you_mean
from .layer import LoraEmbedding, LoraLayer, lora_class_for


@dataclass(frozen=True)
class Match:
    """A module to adapt: its first name, all its names (shared modules have several), settings."""

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    rank: int
    alpha: float
    scaling: float


def match_targets(model: nn.Module, config: LoraConfig) -> list[Match]:
    """The modules that `config` names, in the model's order.

    Raises:
        UserError: a target, exclusion, layer index or rank/alpha pattern matches nothing. The
            message gives the nearest names and what could be matched.
    """
    candidates = adaptable(model)
    saved = modules_to_save(model, config.modules_to_save)
    outside = {alias for name in saved for alias in _subtree(model, name)}
    candidates = {
        name: aliases for name, aliases in candidates.items() if not outside.intersection(aliases)
    }
    if not candidates:
        raise UserError(f"{type(model).__name__} has no linear or embedding layer to adapt.")

    chosen = _included(model, config, candidates)
    chosen = _without_excluded(config, chosen, candidates)
    chosen = _in_layers(config, chosen)
    if not chosen:
        raise UserError(
            f"lora.targets {config.targets!r} less lora.exclude {config.exclude!r} leaves no module "
            f"to adapt. {_could_be(candidates)}"
        )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(pattern_for({pattern: 0}, name) for name in chosen):
                raise _no_match(f"lora.{option}", pattern, chosen)
    modules = dict(model.named_modules())
    return [
        Match(
            name,
            tuple(aliases),
            modules[name],
            config.rank_of(name),
            config.alpha_of(name),
            config.scaling_of(name),
        )
        for name, aliases in chosen.items()
    ]


def adaptable(model: nn.Module) -> dict[str, list[str]]:
    """Name and all aliases of each layer that LoRA can wrap, in the model's order."""
    aliases: dict[int, list[str]] = {}
    skipped: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            # It reads out_proj.weight without calling out_proj: a wrapper there would do nothing.
            skipped.update(id(child) for child in module.children())
        if name and not isinstance(module, LoraLayer) and lora_class_for(module) is not None:
            aliases.setdefault(id(module), []).append(name)
    return {names[0]: names for key, names in aliases.items() if key not in skipped}


def head_modules(model: nn.Module) -> list[str]:
    """Names of a Hugging Face model's task-head modules, the ones around the bare base model.

    That is the output embedding (lm_head) and, where the base model sits in an attribute of its
    own (`bert`, `model`, `transformer`), every module beside it.
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
    """The modules, by name, that `patterns` (exact names or suffixes) ask to train whole.

    Raises:
        UserError: a pattern matches nothing, or a module inside another that is already named.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if _ends_with(name, pattern)]
        if not hits:
            raise UserError(
                f"lora.modules_to_save: {pattern!r} matches no module."
                f"{did_you_mean(pattern, _suffixes(names))}"
            )
        found.update(dict.fromkeys(hits))
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def shortest_suffix(name: str, others: Iterable[str], *, minimum: int = 1) -> str:
    """The shortest dotted suffix of `name` that no name in `others` ends with, else `name`."""
    parts = name.split(".")
    others = list(others)
    for length in range(minimum, len(parts)):
        suffix = ".".join(parts[-length:])
        if not any(_ends_with(other, suffix) for other in others):
            return suffix
    return name


def _included(
    model: nn.Module, config: LoraConfig, candidates: dict[str, list[str]]
) -> dict[str, list[str]]:
    modules = dict(model.named_modules())
    if config.targets == ALL_LINEAR:
        heads = {alias for head in head_modules(model) for alias in _subtree(model, head)}
        return {
            name: aliases
            for name, aliases in candidates.items()
            if lora_class_for(modules[name]) is not LoraEmbedding
            and not heads.intersection(aliases)
        }
    if isinstance(config.targets, str):
        chosen = {
            name: aliases
            for name, aliases in candidates.items()
            if any(re.fullmatch(config.targets, alias) for alias in aliases)
        }
        if not chosen:
            raise _no_match("lora.targets", config.targets, candidates, what="regex")
        return chosen
    for target in config.targets:
        if not any(_ends_with(a, target) for names in candidates.values() for a in names):
            known = next((n for n in modules if n and _ends_with(n, target)), None)
            if known is not None:
                raise UserError(
                    f"lora.targets: {target!r} is {known!r}, a {type(modules[known]).__name__}, "
                    f"which LoRA cannot wrap or which is trained whole. {_could_be(candidates)}"
                )
            raise _no_match("lora.targets", target, candidates)
    return {
        name: aliases
        for name, aliases in candidates.items()
        if any(_ends_with(alias, target) for alias in aliases for target in config.targets)
    }


def _without_excluded(
    config: LoraConfig, chosen: dict[str, list[str]], candidates: dict[str, list[str]]
) -> dict[str, list[str]]:
    def excluded(name: str, pattern: str, regex: bool) -> bool:
        return bool(re.fullmatch(pattern, name)) if regex else _ends_with(name, pattern)

    regex = isinstance(config.exclude, str)
    patterns = [config.exclude] if regex else config.exclude
    for pattern in patterns:
        if not any(excluded(a, pattern, regex) for names in candidates.values() for a in names):
            raise _no_match("lora.exclude", pattern, candidates, what="regex" if regex else "name")
    return {
        name: aliases
        for name, aliases in chosen.items()
        if not any(excluded(alias, pattern, regex) for alias in aliases for pattern in patterns)
    }


def _in_layers(config: LoraConfig, chosen: dict[str, list[str]]) -> dict[str, list[str]]:
    if config.layers is None:
        return chosen
    lists = config.layers_pattern
    lists = [lists] if isinstance(lists, str) else list(lists or [r"[^.]*"])
    indices: dict[str, int] = {}
    for name in chosen:
        for pattern in lists:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
            if found:
                indices[name] = int(found.group(1))
                break
    present = sorted(set(indices.values()))
    missing = [layer for layer in config.layers if layer not in present]
    if missing:
        have = f"{present[0]} to {present[-1]}" if present else "none: the names hold no index"
        raise UserError(
            f"lora.layers: no adapted module lies in layer {', '.join(map(str, missing))}. "
            f"Layers that could be named: {have}."
        )
    return {name: chosen[name] for name in chosen if indices.get(name) in config.layers}


def _subtree(model: nn.Module, name: str) -> list[str]:
    """All names, aliases too, of the modules in and under `name`."""
    inside = {id(module) for module in model.get_submodule(name).modules()}
    return [n for n, m in model.named_modules(remove_duplicate=False) if id(m) in inside]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _suffixes(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[start:]) for start in range(len(parts)))
    return found


def _could_be(candidates: Iterable[str]) -> str:
    counts = Counter(name.rsplit(".", 1)[-1] for name in candidates)
    listed = ", ".join(f"{leaf} (x{count})" for leaf, count in list(counts.items())[:30])
    return f"Modules that could be matched, by last name: {listed}."


def _no_match(
    where: str, pattern: str, candidates: Iterable[str], *, what: str = "name"
) -> UserError:
    names = list(candidates)
    hint = did_you_mean(pattern, _suffixes(names))
    return UserError(f"{where}: the {what} {pattern!r} matches no module.{hint} {_could_be(names)}")
