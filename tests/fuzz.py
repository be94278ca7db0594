"""How tests with made-up content run: the same in each run, or with FUZZ=1 other content each."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FUZZ = settings(
    max_examples=300,
    deadline=None,
    print_blob=True,  # how to run the failing example again
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
