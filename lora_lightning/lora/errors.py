"""The one error type that a user's mistake raises, anywhere in the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the message says what is wrong, where, and the fix.

    The command line prints the message alone and exits with `status`.
    """

    status = 2


class ProcessLost(UserError):
    """A process of a run was killed from outside: no mistake, and the run can be tried again."""

    status = 1


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` closest to a misspelt `name`, best first; case does not count."""
    by_lower = {item.lower(): item for item in sorted(set(known))}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, item, name.lower()).ratio() for item in close]
    # A far candidate beside a near one is noise.
    return [by_lower[i] for i, r in zip(close, ratios, strict=True) if r > ratios[0] - 0.15]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x' or 'y'?"`, or an empty string where nothing is near."""
    close = nearest(name, known)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def causes(error: BaseException) -> list[BaseException]:
    """An exception and what it was raised from, down to the first. A chain may be a ring."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain
