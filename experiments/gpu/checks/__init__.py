"""The checks, in the order in which their answers matter."""

from __future__ import annotations

from . import exact, memory, processes, speed, starts

FIRST = (2, 3, 6, 5, 7)
"""Where a mistake is likeliest, or weighs most."""
_ALL = {
    check.number: check
    for module in (starts, exact, speed, memory, processes)
    for check in module.CHECKS
}
CHECKS = {number: _ALL[number] for number in (*FIRST, *sorted(set(_ALL) - set(FIRST)))}
