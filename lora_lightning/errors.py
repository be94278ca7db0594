"""The error type that user mistakes raise, anywhere in the package."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable whose value 1 shows the traceback of a mistake."""


class UserError(ValueError):
    """Mistake in the user's input.

    The message says what is wrong, where, and how to fix it. The command line prints only the
    message and exits with `status`.
    """

    status = 2


class ProcessLost(UserError):
    """Loss of a process of a run that was killed from outside.

    This is not a mistake, and the run can be tried again.
    """

    status = 1


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the names in `known` closest to a misspelled `name`, best first.

    The comparison ignores case.
    """
    by_lower = {item.lower(): item for item in sorted(set(known))}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, item, name.lower()).ratio() for item in close]
    # A far candidate beside a near one is noise.
    return [by_lower[i] for i, r in zip(close, ratios, strict=True) if r > ratios[0] - 0.15]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x' or 'y'?"`, or an empty string if no name is close."""
    close = nearest(name, known)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


_NO_MEMORY = re.compile(
    r"can('t|not) allocate|DefaultCPUAllocator|[Oo]ut of memory|bad_alloc|malloc of size \d+ failed"
    r"|can't start new thread|ThreadPoolBuildError|failed to map segment"
)
"""How libraries report a lack of memory, also for a thread's stack, in any type of error."""


def lack_of_memory(error: BaseException | None) -> str | None:
    """Return the message that reports a lack of memory, or None.

    The search covers an exception and its causes.
    """
    seen: set[int] = set()  # a chain may be a ring
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        message = str(error)
        lacks = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        lacks |= isinstance(error, OSError) and error.errno == errno.ENOMEM
        if lacks or (not isinstance(error, UserError) and _NO_MEMORY.search(message)):
            return message.splitlines()[0][:200] if message else type(error).__name__
        error = error.__cause__ or error.__context__
    return None


def causes(error: BaseException) -> list[BaseException]:
    """Return an exception and the chain of its causes, down to the first.

    A chain may be a ring.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain
