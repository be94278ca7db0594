"""Checks of single settings against a range or a list of choices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lora_lightning.errors import UserError, did_you_mean


def check_range(
    setting: str, value: Any, interval: str, *, whole: bool = False, words: Iterable[Any] = (None,)
) -> None:
    """Check that a number is in an interval.

    Args:
        setting: name of the setting, for the message.
        value: the number.
        interval: interval in the notation of mathematics, such as "[0, 1)" or "(0, inf)".
        whole: whether the number must be whole (default: False).
        words: other values that are allowed (default: None alone).

    Raises:
        UserError: the value is outside of the interval, or is no number.
    """
    if any(value is word or (isinstance(word, str) and value == word) for word in words):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if is_number:
        above = low <= value if interval.startswith("[") else low < value
        if above and (value <= high if interval.endswith("]") else value < high):
            return
    kind = "a whole number, " if whole and not is_number else ""
    if high == math.inf:
        finite = "finite and " if value == math.inf else ""
        place = f"{finite}{'at least' if interval.startswith('[') else 'above'} {low:g}"
    elif interval.endswith("]"):
        closed = f"from {_shown(low)} to {_shown(high)}"
        open_ = f"above {_shown(low)} and at most {_shown(high)}"
        place = closed if interval.startswith("[") else open_
    else:
        place = f"in {interval}"
    others = "".join(f", or {word}" for word in words if word is not None)
    raise UserError(f"{setting}={value}: must be {kind}{place}{others}.")


def _shown(number: float) -> str:
    """Write a number without an exponent if it is short."""
    return str(int(number)) if number.is_integer() and abs(number) < 1e12 else f"{number:g}"


def check_choice(setting: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that a value is one of a list. None in the list is shown as null.

    Raises:
        UserError: it is not.
    """
    choices = tuple(choices)
    if value not in choices:
        names = ["null" if choice is None else str(choice) for choice in choices]
        raise UserError(
            f"{setting}={value}: must be {'one of ' if len(names) > 2 else ''}"
            f"{', '.join(names[:-1])}{' or ' if len(names) > 1 else ''}{names[-1]}."
            f"{did_you_mean(str(value), names)}"
        )
