"""What a check expects of its figures, and the verdict on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lab import Lab

Figures = dict[str, Any]
LEFT_OUT = "left_out"
"""Among the figures: those that could not be measured here, each with the reason."""
SAME = object()


class Skip(Exception):
    """A check cannot be made here; the message says why."""


class Failure(Exception):
    """A check has failed before there was a figure; the message says how."""


@dataclass(frozen=True)
class Bound:
    """A limit of one figure.

    Args:
        relation: <=, >= or ==.
        limit: of the figure on a GPU.
        rehearsal: of the figure in the small form on a CPU; None: it is not judged there.
    """

    relation: str
    limit: Any
    rehearsal: Any = SAME

    def on(self, *, rehearsal: bool) -> Any:
        """The limit that holds; None: none does."""
        return self.rehearsal if rehearsal and self.rehearsal is not SAME else self.limit

    def holds(self, value: Any, limit: Any) -> bool:
        """Whether a value keeps to a limit. What is no number keeps to none."""
        if self.relation == "==":
            return bool(value == limit)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return bool(value <= limit if self.relation == "<=" else value >= limit)


def at_most(limit: float, *, rehearsal: Any = SAME) -> Bound:
    return Bound("<=", limit, rehearsal)


def at_least(limit: float, *, rehearsal: Any = SAME) -> Bound:
    return Bound(">=", limit, rehearsal)


def equals(limit: Any, *, rehearsal: Any = SAME) -> Bound:
    return Bound("==", limit, rehearsal)


@dataclass(frozen=True)
class Check:
    """One question, how it is measured, and which figures answer it well.

    Args:
        number: the check's id.
        name: what it is called in the table.
        measure: gives the figures.
        expects: bounds by figure.
        minutes: that it should take on a GPU.
        limit: seconds after which it is ended.
    """

    number: int
    name: str
    measure: Callable[[Lab], Figures]
    expects: dict[str, Bound] = field(default_factory=dict)
    minutes: float = 1.0
    limit: float = 300.0

    def expected(self, *, rehearsal: bool) -> dict[str, str]:
        """The bounds that hold, as text."""
        limits = {name: bound.on(rehearsal=rehearsal) for name, bound in self.expects.items()}
        return {
            name: f"{self.expects[name].relation} {limit}"
            for name, limit in limits.items()
            if limit is not None
        }


def verdict(check: Check, figures: Figures, *, rehearsal: bool) -> tuple[str, str]:
    """Status (pass, fail or skip) and message.

    A figure that is expected must be there, unless the check says that it left it out. Where all
    that is expected was left out the check counts as skipped.
    """
    left_out = figures.get(LEFT_OUT, {})
    asked = [name for name in check.expected(rehearsal=rehearsal) if name not in left_out]
    problems = []
    for name in asked:
        bound = check.expects[name]
        limit = bound.on(rehearsal=rehearsal)
        if name not in figures:
            problems.append(f"{name} was not measured")
        elif not bound.holds(figures[name], limit):
            problems.append(f"{name} is {shown(figures[name])}, not {bound.relation} {limit}")
    reasons = sorted({str(reason) for reason in left_out.values()})
    if problems:
        return "fail", "; ".join(problems)
    if left_out and not asked:
        return "skip", "; ".join(reasons)
    return "pass", f"left out: {'; '.join(reasons)}" if reasons else ""


def run(check: Check, lab: Lab) -> tuple[str, Figures, str]:
    """Measures and judges: status, figures, message."""
    try:
        figures = check.measure(lab)
    except Skip as reason:
        return "skip", {}, str(reason)
    except Failure as failure:
        return "fail", {}, str(failure)
    return (status := verdict(check, figures, rehearsal=lab.rehearsal))[0], figures, status[1]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:300]
