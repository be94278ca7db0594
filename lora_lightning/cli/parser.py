"""Command lines of the verbs, which are the signatures of their functions.

An argument is typed as NAME=VALUE. Its name, type and default are those of the parameter, and its
help is in the docstring. All other words go to the parameter `overrides`.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_lightning.errors import UserError, did_you_mean

OVERRIDES = "overrides"
"""Parameter that takes the settings of the config, in Hydra's grammar."""
Folder = Annotated[Path, "DIR"]
File = Annotated[Path, "FILE"]
FileOrFolder = Annotated[Path, "PATH"]


@dataclass(frozen=True)
class Argument:
    """An argument of a verb.

    Args:
        name: name as it is typed.
        kind: type of its value.
        value: placeholder for the value in help and messages.
        help: what it means.
        required: whether it must be typed.
        positional: whether it is typed without its name.
    """

    name: str
    kind: Any
    value: str
    help: str
    required: bool
    positional: bool

    @property
    def typed(self) -> str:
        """The argument as it is typed."""
        return self.value if self.positional else f"{self.name}={self.value}"


def arguments_of(function: Callable[..., Any]) -> dict[str, Argument]:
    """Return the arguments of a verb by name, read from the signature of its function."""
    hints = get_type_hints(function, include_extras=True)
    helps = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(function) or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in helps}
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name != OVERRIDES:
            kind = _without_none(hints[name])
            required = parameter.default is parameter.empty
            positional = parameter.kind is parameter.POSITIONAL_ONLY
            found[name] = Argument(name, kind, _value(kind), texts[name], required, positional)
    return found


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(each for each in get_args(hint) if each is not type(None))
    return hint


def _value(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1])
    if get_origin(kind) is list:
        each = _value(get_args(kind)[0])
        return f"{each},{each},..."
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {str: "TEXT", int: "N", float: "X"}[kind]


def parse(verb: str, function: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """Return the values that a command line gives to the parameters of a verb's function.

    Raises:
        UserError: an argument is unknown, missing, or has a wrong value.
    """
    arguments = arguments_of(function)
    if any(argument.positional for argument in arguments.values()):
        (argument,) = arguments.values()
        if len(words) != 1 or "=" in words[0]:
            raise UserError(
                f"{verb} requires {argument.value}, and no other argument: "
                f"lora-lightning {verb} {argument.typed}"
            )
        return {argument.name: _convert(replace(argument, name=verb), words[0])}
    typed: dict[str, str] = {}
    overrides = []
    for word in words:
        name, equals, text = word.partition("=")
        if equals and name in arguments:
            typed[name] = text
        else:
            overrides.append(word)
    takes_overrides = OVERRIDES in inspect.signature(function).parameters
    if overrides and not takes_overrides:
        raise unknown_argument(verb, overrides[0], arguments)
    for argument in arguments.values():
        if argument.required and not typed.get(argument.name):
            raise UserError(f"{verb} requires {argument.typed}: {argument.help}")
    values: dict[str, Any] = {name: _convert(arguments[name], text) for name, text in typed.items()}
    return values | ({OVERRIDES: overrides} if takes_overrides else {})


def unknown_argument(verb: str, word: str, arguments: dict[str, Argument]) -> UserError:
    """Return the error for a word that is no argument of a verb."""
    name = word.partition("=")[0]
    return UserError(
        f"{name}: unknown argument of {verb}.{did_you_mean(name, arguments)} Known: "
        f"{', '.join(arguments)}."
    )


def _convert(argument: Argument, text: str) -> Any:
    kind = argument.kind
    if get_origin(kind) is not list:
        return _value_of(argument.name, kind, text)
    parts = (part.strip() for part in text.strip("[]").split(","))
    return [_value_of(argument.name, get_args(kind)[0], part) for part in parts if part]


def _value_of(name: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Annotated:
        from lora_lightning.utils.output_folders import expanded

        return expanded(text, name)
    if get_origin(kind) is Literal:
        from lora_lightning.utils.checks import check_choice

        check_choice(name, text, get_args(kind))
        return text
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name}={text}: must be {what}.") from None
