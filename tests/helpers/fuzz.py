"""How tests with made-up content run: other content in each run, of which FUZZ says how much.

The failing example is printed, with how to run it again; `.hypothesis/` keeps it for the next run.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", "20")),
    deadline=None,
    print_blob=True,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
