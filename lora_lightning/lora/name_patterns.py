"""Suffixes and regexes of dotted names, matched by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

ALL_LINEAR = "all-linear"
"""Value of `targets` for every linear layer except heads."""


def parse_names(value: Any) -> Any:
    """Return names as a list, from one name or comma-separated names of a command line."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [] if value is None else value


def parse_patterns(value: Any) -> Any:
    """Return a list of suffixes, or a string that is "all-linear" or a regex.

    A value of another type is returned unchanged.
    """
    if not isinstance(value, str):
        is_list = isinstance(value, Sequence)
        return [] if value is None else list(value) if is_list else value
    if value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", value) and ".*" not in value:
        return parse_names(value)
    return value


def ends_with(name: str, suffix: str) -> bool:
    """Return whether `name` is `suffix`, or ends with it after a dot."""
    return name == suffix or name.endswith(f".{suffix}")


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Return whether a regex matches all of `name`, or a suffix in a list matches its end."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(ends_with(name, pattern) for pattern in patterns)


def suffixes(names: Iterable[str]) -> set[str]:
    """Return all dotted suffixes of the names, including the names themselves."""
    parts = [name.split(".") for name in names]
    return {".".join(part[start:]) for part in parts for start in range(len(part))}


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


def within_layer(name: str) -> str:
    """Return a name without the path of its layer, for example attention.output.dense."""
    *parents, leaf = name.split(".")
    parents = ["*" if part.isdigit() else part for part in parents]
    start = parents.index("*") + 1 if "*" in parents else -1
    return ".".join([*parents[start:], leaf])


def pattern_for(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that matches the end of `name`, as in PEFT's rank_pattern."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def exact_pattern(pattern: str, name: str, others: Iterable[str]) -> str:
    """Return a key for `rank_pattern` that matches `name` and none of `others`.

    Args:
        pattern: the end of `name`. It is the key if it does not match any of the others.
        name: name of a module. It may be the end of another name, and ^ then distinguishes them.
        others: names of modules.
    """
    if not pattern_for([pattern], name):  # it contains regex metacharacters
        pattern = re.escape(pattern)
    if any(pattern_for([pattern], other) for other in others):
        return f"^{re.escape(name)}"
    return pattern


def exact_targets(names: Iterable[str]) -> str:
    """Return targets that match only these modules, as one regex.

    Other names that end in one of these names do not match.
    """
    return f"^({'|'.join(re.escape(name) for name in sorted(names))})$"
