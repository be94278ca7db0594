"""A report in the terminal, as CSV and as Markdown, and the writing of its files."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lightning.errors import UserError
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.terminal import fenced, one_line, printable

from .results import Sweep
from .summary import best_lines, failures, made_with, rows_by_run, rows_by_setting, stopped_lines

REPORT_FILES = {
    "results.csv": r"\Ajob,status,.*,folder\n",
    "report.md": r"(?m)^Figures and curves: report\.html; every run with all its numbers: results",
    "report.html": r"<h2>Settings, the best first</h2>",
}
"""The files of a report, each with a pattern that identifies its content."""
OPTIONAL_COLUMNS = ("tokens/s", "scale", "memory", "trained", "time")
"""Columns that a narrow terminal omits; the files keep them."""


def print_report(sweep: Sweep) -> None:
    """Print the table, the failures, and the paths of all reports."""
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(_fitting_table(sweep, console))
    for line in stopped_lines(sweep):
        console.print(printable(line))
    for jobs, error in failures(sweep):
        several = "jobs" if " " in jobs else "job"
        console.print(printable(f"{several} {jobs} failed: {error}"), soft_wrap=True)
    lines = [] if sweep.best is None else best_lines(sweep.best, sweep)
    lines.append(("Curves", f"tensorboard --logdir {shlex.quote(str(sweep.folder))}"))
    lines.append(("Report", str(sweep.folder / "report.html")))
    if sweep.resume:
        lines.append(("Resume", sweep.resume))
    for name, text in lines:
        console.print(printable(f"{name + ':':10}{text}"), soft_wrap=True)


def _fitting_table(sweep: Sweep, console: Console) -> Table:
    """Return the table of settings with the columns that fit into the terminal."""
    rows = rows_by_setting(sweep)
    columns = list(rows[0])
    unbounded = console.options.update(width=10_000)
    for omitted in (None, *OPTIONAL_COLUMNS):
        columns = [column for column in columns if column != omitted]
        title = printable(f"{sweep.folder}: {sweep.counts()}")
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(printable(column), overflow="fold")
        for row in rows:
            table.add_row(*(printable(row[column]) for column in columns))
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
    return table


def write_csv(sweep: Sweep, path: Path) -> None:
    """Write a CSV file with a row for each run."""
    rows = rows_by_run(sweep)
    handle = io.StringIO(newline="")
    writer = csv.DictWriter(handle, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _text_cell(v) if isinstance(v, str) else v for k, v in row.items()})
    write_report_file(path, handle.getvalue())


def _text_cell(text: str) -> str:
    """Return the text of a cell that no spreadsheet program takes for a formula.

    A leading apostrophe marks such a cell as text.
    """
    is_formula = text.startswith(("=", "+", "-", "@", "\t", "\r"))
    return "'" * is_formula + printable(text)


def write_markdown(sweep: Sweep, path: Path) -> None:
    """Write the table of settings, the failures and the best run as Markdown."""
    counts = one_line(sweep.counts())
    lines = [f"# Sweep {one_line(sweep.folder.name)}", "", f"{len(sweep.runs)} runs: {counts}.", ""]
    lines += _markdown_rows(sweep)
    if sweep.best is not None:
        *texts, (name, command) = best_lines(sweep.best, sweep)
        lines += ["", *(f"* {label}: {one_line(text)}" for label, text in texts)]
        lines += ["", f"{name}:", "", *fenced(command)]
    if sweep.resume:
        lines += ["", "Resume:", "", *fenced(sweep.resume)]
    if stopped_lines(sweep):
        lines += ["", "## Stopped early", ""]
        lines += [f"* {one_line(line)}" for line in stopped_lines(sweep)]
    if sweep.failed:
        lines += ["", "## Failures", ""]
        lines += [f"* job {one_line(jobs)}: {one_line(error)}" for jobs, error in failures(sweep)]
    lines += ["", "Figures and curves: report.html; every run with all its numbers: results.csv."]
    lines += [f"Made with {one_line(made_with(sweep))}."] if made_with(sweep) else []
    write_report_file(path, printable("\n".join(lines)) + "\n")


def _markdown_rows(sweep: Sweep) -> list[str]:
    rows = rows_by_setting(sweep)
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(map(one_line, values))} |" for values in cells]


def check_report_files(folder: Path) -> None:
    """Check that the report replaces no other file.

    Raises:
        UserError: a file has the name of a report but is not one.
    """
    for name, pattern in REPORT_FILES.items():
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            is_report = re.search(pattern, text) is not None or (path.is_file() and not text)
        except OSError:
            is_report = False
        if os.path.lexists(path) and not is_report:
            raise UserError(
                f"{path}: is not a report, and the report would replace it. Move it away."
            )


def write_report_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}.") from None
