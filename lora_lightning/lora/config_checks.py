"""Checks of an adapter's settings: the range of each, and the pairs that exclude each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import UserError, did_you_mean

from .layers.fused_parts import parse_parts

if TYPE_CHECKING:
    from .config import LoraConfig

BIAS_MODES = ("none", "all", "lora_only")
INITS = ("kaiming", "gaussian", "pissa", "olora", "eva", "loftq")
_FAST_PISSA = re.compile(r"pissa_niter_[1-9]\d*")


@dataclass(frozen=True)
class Conflict:
    """Two settings that exclude each other where both differ from their defaults."""

    setting: str
    other: str
    reason: str
    values: tuple[str, ...] = ("",)
    """Prefixes of the values of `other` that conflict, all by default."""


_SCALING = "since both set the scaling"
_WHOLE = "which takes a fused layer as a whole"
_PLAIN = "since PEFT has only plain LoRA on parameters"
CONFLICTS = (
    Conflict("scale", "alpha", _SCALING),
    Conflict("scale", "alpha_ratio", _SCALING),
    Conflict("alpha", "alpha_ratio", _SCALING),
    Conflict("freeze_A", "init", "which has no random A", ("pissa", "olora", "loftq")),
    Conflict("use_dora", "init", "which corrects the weights that DoRA measures", ("loftq",)),
    Conflict("parts", "use_dora", _WHOLE),
    Conflict("parts", "init", _WHOLE, ("pissa", "olora", "eva", "loftq")),
    Conflict("target_parameters", "use_dora", _PLAIN),
    Conflict("target_parameters", "init", _PLAIN, ("pissa", "olora", "eva", "loftq")),
    Conflict("target_parameters", "dropout", _PLAIN),
    Conflict("target_parameters", "bias", _PLAIN),
)


def check_config(config: LoraConfig) -> None:
    """Check the settings of an adapter, and report every mistake at once.

    Raises:
        UserError: a value is out of range, or settings exclude each other.
    """
    problems = [*_out_of_range(config)] or [*_invalid_regexes(config), *_excluded(config)]
    if problems:
        raise UserError("\n".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(map(is_valid, value))


def _is_init(value: Any) -> bool:
    return value in INITS or _FAST_PISSA.fullmatch(str(value)) is not None


def _are_names(value: Any) -> bool:
    return _is_list(value, lambda item: isinstance(item, str) and item != "")


def _are_patterns(value: Any) -> bool:
    return isinstance(value, str) or _are_names(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _are_layers(value: Any) -> bool:
    return _is_list(value, lambda item: type(item) is int) and len(value) > 0


def _are_tokens(value: Any) -> bool:
    """Return whether a value is a list of distinct token ids, or such lists by name."""
    lists = value.values() if isinstance(value, dict) and value else [value]
    return all(
        isinstance(ids, list)
        and ids
        and all(type(item) is int and item >= 0 for item in ids)
        and len(set(ids)) == len(ids)
        for ids in lists
    )


_POSITIVE = _is_positive, "a positive number"
_COUNT = _is_count, "a whole number of at least 1"
_NAMES = _are_names, "a list of names"
_PATTERNS = _are_patterns, "a string or a list of names"
_MAPPING = _is_mapping, "a mapping of names to values"
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": _COUNT,
    "alpha": _POSITIVE,
    "alpha_ratio": _POSITIVE,
    "scale": _POSITIVE,
    "eva_rho": (lambda v: _is_number(v) and v >= 1, "a number of at least 1"),
    "dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "bias": (lambda v: v in BIAS_MODES, f"one of {', '.join(BIAS_MODES)}"),
    "init": (_is_init, f"one of {', '.join(INITS)}"),
    "targets": _PATTERNS,
    "exclude": _PATTERNS,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "layers": (_are_layers, "a list of layer indices, or null for all layers"),
    "layers_pattern": _NAMES,
    "rank_pattern": _MAPPING,
    "alpha_pattern": _MAPPING,
    "parts": _MAPPING,
    "trainable_token_indices": (
        _are_tokens,
        "a list of token ids, each once, or such lists by names of modules",
    ),
}
_OPTIONAL = ("alpha", "scale", "layers", "layers_pattern", "trainable_token_indices")
_CHOICES = {"bias": BIAS_MODES, "init": INITS}


def _out_of_range(config: LoraConfig) -> Iterator[str]:
    """Yield a message for each value that is out of range."""
    values = {name: getattr(config, name) for name in _RANGES}
    for name, (is_valid, expected) in _RANGES.items():
        if values[name] is None and name in _OPTIONAL:
            continue
        if not is_valid(values[name]):
            hint = did_you_mean(str(values[name]), _CHOICES.get(name, ()))
            yield f"lora.{name}={values[name]!r}: must be {expected}.{hint}"
        elif name in ("rank_pattern", "alpha_pattern"):
            is_valid, expected = _RANGES[name.removesuffix("_pattern")]
            for pattern, value in values[name].items():
                if not is_valid(value):
                    yield f"lora.{name}[{pattern!r}]={value!r}: must be {expected}."
        elif name == "parts":
            for pattern, value in values[name].items():
                try:
                    parse_parts(f"lora.parts[{pattern!r}]", value)
                except UserError as error:
                    yield str(error)
    if not (config.targets or config.target_parameters):
        yield "lora.targets is empty: set 'all-linear', module names or a regex."


def _invalid_regexes(config: LoraConfig) -> Iterator[str]:
    """Yield a message for each pattern that is not a valid regex."""
    for name in ("targets", "exclude", "layers_pattern", "rank_pattern", "alpha_pattern", "parts"):
        value = getattr(config, name)
        if isinstance(value, str):
            value = [value]
        elif name in ("targets", "exclude"):
            continue  # a list holds suffixes
        for regex in value or []:
            try:
                re.compile(regex)
            except (re.error, TypeError) as error:
                yield f"lora.{name}: {regex!r} is not a valid regular expression: {error}."


def _excluded(config: LoraConfig) -> Iterator[str]:
    """Yield a message for each pair of settings that exclude each other."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }
    changed = {name for name, value in defaults.items() if getattr(config, name) != value}
    for conflict in CONFLICTS:
        pair = (conflict.setting, conflict.other)
        if changed.issuperset(pair) and str(getattr(config, pair[1])).startswith(conflict.values):
            first, second = (_typed(name, getattr(config, name)) for name in pair)
            reset = " or ".join(f"lora.{name}={_plain(defaults[name])}" for name in reversed(pair))
            yield f"{first}: not supported with {second}, {conflict.reason}. Set {reset}."
    if config.layers_pattern and config.layers is None:
        yield "lora.layers_pattern: requires lora.layers, the indices in these module lists."


def _typed(name: str, value: Any) -> str:
    """Return a setting as it is typed on the command line, or its name if the value is long."""
    return f"lora.{name}" if isinstance(value, (list, dict)) else f"lora.{name}={_plain(value)}"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
