"""The report as a single file, report.html, which loads nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lora_lightning.utils.terminal import printable

from .plots import plots
from .results import Sweep
from .summary import (
    best_lines,
    error_of,
    made_with,
    rows_by_run,
    rows_by_setting,
    stopped_lines,
)
from .tables import write_report_file

OMITTED = ("error", "config_hash", "stopped")
"""Columns of results.csv that the page omits."""


def write_page(sweep: Sweep, path: Path) -> None:
    """Write the HTML page of a sweep."""
    write_report_file(path, printable(page(sweep)))


def page(sweep: Sweep) -> str:
    """Return the page as HTML."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    runs = [
        {name: _text(value) for name, value in row.items() if name not in OMITTED}
        for row in rows_by_run(sweep)
    ]
    failures = [
        (run.job, " ".join(f"{key}={run.given.get(key)}" for key in sweep.varied), error_of(run))
        for run in sweep.failed
    ]
    return environment.from_string(template).render(
        sweep=sweep,
        best_lines=[] if sweep.best is None else best_lines(sweep.best, sweep),
        failures=failures,
        stopped_lines=stopped_lines(sweep),
        settings=rows_by_setting(sweep),
        plots=plots(sweep),
        made_with=made_with(sweep),
        runs=runs,
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
