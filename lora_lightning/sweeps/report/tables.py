"""Tables of a sweep: in the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_lightning.errors import UserError
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.terminal import fenced, one_line, printable

from .results import SEED, Setting, Sweep

MEASURED = (
    "trainable_parameters",
    "total_parameters",
    "adapter_bytes",
    "epochs",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_memory_mib",
)

SIGNS = {
    "results.csv": r"\Ajob,status,.*,folder\n",
    "report.md": r"(?m)^Figures and curves: report\.html; every run with all its numbers: results",
    "report.html": r"<h2>Settings, the best first</h2>",
}
"""The files of a report, each with a pattern that identifies its content."""
MOST_NAMED = 5
"""Maximum number of settings that a line names."""
LESS_WANTED = ("tokens/s", "scale", "memory", "trained", "time")
"""Columns that a narrow terminal omits; the files keep them."""


def rows_by_run(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a row for each run, with all its known values."""
    return [
        {
            "job": run.job,
            "status": run.status,
            **{key: run.given.get(key, "") for key in sweep.varied},
            **run.adapter,
            "seed": run.config.seed,
            "objective": run.objective,
            **{name: run.result.get(name) for name in (*sweep.metrics, *MEASURED)},
            "config_hash": run.result.get("config_hash"),
            "error": first_line(run.result.get("error")),
            "value_at_last_rung": (run.result.get("rungs") or [{}])[-1].get("value"),
            "stopped": run.result.get("stopped"),
            "folder": str(run.folder),
        }
        for run in sweep.runs
    ]


def rows_by_setting(sweep: Sweep) -> list[dict[str, str]]:
    """Return a row of text for each setting, the best first, with mean and deviation over seeds."""
    return [
        {
            "job": " ".join(run.job for run in setting.runs),
            **{key: _short(value) for key, value in setting.values.items()},
            "scale": _number(setting.runs[0].adapter["scale"]),
            sweep.monitor: _objective(setting),
            **({sweep.headline: spread(setting, sweep.headline)} if sweep.headline else {}),
            "trained": _whole(setting.mean("trainable_parameters")),
            "time": _with(setting.mean("seconds"), "{:,.0f} s"),
            "tokens/s": _whole(setting.mean("tokens_per_second")),
            "memory": _with(setting.mean("peak_memory_mib"), "{:,.0f} MiB"),
            "status": " ".join(dict.fromkeys(run.status for run in setting.runs)),
        }
        for setting in sweep.settings
    ]


def spread(setting: Setting, metric: str) -> str:
    """Return the mean ± deviation over the seeds."""
    mean, deviation = setting.mean(metric), setting.deviation(metric)
    if mean is None:
        return "-"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _objective(setting: Setting) -> str:
    """Return the monitored metric, or its values at the last rungs if the setting is unfinished."""
    rungs = [run.result["rungs"][-1] for run in setting.runs if run.result.get("rungs")]
    if setting.mean("objective") is not None or not rungs:
        return spread(setting, "objective")
    return ", ".join(f"{rung['value']:.4f} at step {rung['step']}" for rung in rungs)


def best_lines(best: Setting, sweep: Sweep) -> list[tuple[str, str]]:
    """Return the lines on the best setting: mean, reliability of the mean, adapter and command."""
    done = [run for run in best.runs if run.objective is not None]
    seeds = f"mean of {len(done)} seeds" if len(done) > 1 else "one seed"
    lines = [
        ("Best", f"{best.name}: {sweep.monitor} {spread(best, 'objective')}, {seeds}"),
        *((("Doubts", line),) if (line := _doubts(best, sweep)) else ()),
        *((("Alike", line),) if (line := _alike(sweep)) else ()),
        *((("Beside", line),) if (line := _majority(sweep)) else ()),
        *(("Warning", line) for line in warnings(sweep)),
        ("Adapter", str(done[0].folder / "adapter")),
    ]
    if len(done) > 1:
        lines[-1] = ("Adapter", f"{lines[-1][1]} (the first of jobs {best.jobs})")
    left = (SEED,) if SEED in sweep.varied else ()
    return [*lines, ("Again", done[0].command_without(*left))]


def _doubts(best: Setting, sweep: Sweep) -> str:
    told = []
    if sweep.rows:
        told.append(f"one of {sweep.rows} rows is {100 / sweep.rows:.2g} % of {sweep.monitor}")
    if len(best.runs) > 1:
        told.append("the seeds share their rows, so ± does not show the chance in which these are")
    return "; ".join(told)


def _alike(sweep: Sweep) -> str:
    """Return a line on the settings that are indistinguishable from the best, and the criterion."""
    compared = [one for one in sweep.settings if one.mean("objective") is not None]
    if len(compared) < 2:
        return ""
    shown = sweep.alike()
    both = sweep.is_share and sweep.rows
    by = f"two standard errors of {'seeds and rows' if both else 'seeds'}"
    if not shown:
        one_each = all(one.deviation("objective") is None for one in compared)
        if one_each and not both:
            return "a seed each does not tell which settings differ: seed=0,1,2"
        return f"none of the other {len(compared) - 1} settings is within {by}"
    names = "; ".join(one.name for one in shown[:MOST_NAMED])
    more = f"; and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    return f"{len(shown)} settings are within {by}, so not told from it: {names}{more}"


def _majority(sweep: Sweep) -> str:
    """Return the monitored metric of a baseline without learning."""
    for run in sweep.runs:
        told = run.result.get("baseline", {})
        if sweep.monitor in told:
            name = told.get("name", "without learning")
            return f"{name}: {sweep.monitor} {told[sweep.monitor]:.4f}"
    return ""


def warnings(sweep: Sweep) -> list[str]:
    """Return the warnings of the runs about their rows, each once."""
    every = [line for run in sweep.runs for line in run.result.get("warnings", [])]
    return list(dict.fromkeys(every))


def made_with(sweep: Sweep) -> str:
    """Return the hardware, precision and versions that the runs report; "" if none does."""
    told = [run.result for run in sweep.runs if run.result.get("versions")]
    kinds = {
        f"{one['device']} {one.get('precision', '')}".strip() for one in told if "device" in one
    }
    every = [f"{name} {number}" for one in told for name, number in one["versions"].items()]
    return ", ".join([*sorted(filter(None, kinds)), *dict.fromkeys(every)])


def stopped_lines(sweep: Sweep) -> list[str]:
    """Return lines on when and why successive halving stopped runs, and on the steps it took."""
    ended = all(run.status in ("completed", "failed") for run in sweep.runs)
    if sweep.share_of_steps is None or ended:
        return []
    saved = f"{sweep.share_of_steps:.0%} of the optimizer steps of all jobs to their end"
    if any(run.status not in ("completed", "stopped", "failed") for run in sweep.runs):
        saved += " so far"
    lines = [f"job {run.job} stopped {run.result.get('stopped')}" for run in sweep.stopped]
    return [*lines, f"Successive halving took {saved}."]


def terminal_report(sweep: Sweep) -> None:
    """Print the table, the failures, and the paths of all reports."""
    console = Console(markup=False, emoji=False, highlight=False)
    rows = rows_by_setting(sweep)
    columns = list(rows[0])
    title = f"{sweep.folder}: {sweep.counts()}"
    table = _table(title, columns, rows)
    unbounded = console.options.update(width=10_000)
    for column in LESS_WANTED:
        if console.measure(table, options=unbounded).maximum <= console.width:
            break
        columns.remove(column)
        table = _table(title, columns, rows)
    console.print(table)
    for line in stopped_lines(sweep):
        console.print(printable(line))
    for error, jobs in _failures(sweep):
        several = "jobs" if " " in jobs else "job"
        console.print(printable(f"{several} {jobs} failed: {error}"), soft_wrap=True)
    if sweep.best is not None:
        for name, text in best_lines(sweep.best, sweep):
            console.print(printable(f"{name + ':':9}{text}"), soft_wrap=True)
    logdir = shlex.quote(str(sweep.folder))
    console.print(printable(f"Curves:  tensorboard --logdir {logdir}"), soft_wrap=True)
    console.print(printable(f"Report:  {sweep.folder / 'report.html'}"), soft_wrap=True)


def _failures(sweep: Sweep) -> list[tuple[str, str]]:
    """Return each reason for a failure once, with the numbers of its jobs."""
    found: dict[str, list[str]] = {}
    for run in sweep.failed:
        found.setdefault(first_line(run.result.get("error")), []).append(run.job)
    return [(error, " ".join(jobs)) for error, jobs in found.items()]


def _table(title: str, columns: list[str], rows: list[dict[str, str]]) -> Table:
    table = Table(title=printable(title), title_justify="left")
    for column in columns:
        table.add_column(printable(column), overflow="fold")
    for row in rows:
        table.add_row(*(printable(row[column]) for column in columns))
    return table


def write_csv(sweep: Sweep, path: Path) -> None:
    """Write a CSV file with a row for each run."""
    rows = rows_by_run(sweep)

    handle = io.StringIO(newline="")
    writer = csv.DictWriter(handle, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v) if isinstance(v, str) else v for k, v in row.items()})
    written(path, handle.getvalue())


def _cell(text: str) -> str:
    """Return the text of a cell that no spreadsheet program takes for a formula.

    A leading apostrophe marks such a cell as text.
    """
    is_formula = text.startswith(("=", "+", "-", "@", "\t", "\r"))
    return "'" * is_formula + printable(text)


def write_markdown(sweep: Sweep, path: Path) -> None:
    """Write the table of settings, the failures and the best run as Markdown."""
    rows = rows_by_setting(sweep)
    counts = one_line(sweep.counts())
    lines = [f"# Sweep {one_line(sweep.folder.name)}", "", f"{len(sweep.runs)} runs: {counts}.", ""]
    lines += [_cells(list(rows[0])), _cells(["---"] * len(rows[0]))]
    lines += [_cells(list(row.values())) for row in rows]
    if sweep.best is not None:
        *named, (again, command) = best_lines(sweep.best, sweep)
        lines += ["", *(f"* {name}: {one_line(text)}" for name, text in named)]
        lines += ["", f"{again}:", "", *fenced(command)]
    if stopped_lines(sweep):
        lines += [
            "",
            "## Stopped early",
            "",
            *(f"* {one_line(line)}" for line in stopped_lines(sweep)),
        ]
    if sweep.failed:
        lines += ["", "## Failures", ""]
        lines += [f"* job {one_line(jobs)}: {one_line(error)}" for error, jobs in _failures(sweep)]
    lines += ["", "Figures and curves: report.html; every run with all its numbers: results.csv."]
    lines += [f"Made with {one_line(made_with(sweep))}."] if made_with(sweep) else []
    written(path, printable("\n".join(lines)) + "\n")


def refuse_others(folder: Path) -> None:
    """Raise UserError if a file has the name of a report but is not one."""
    for name, sign in SIGNS.items():
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            own = re.search(sign, text) is not None or (path.is_file() and not text)
        except OSError:
            own = False
        if os.path.lexists(path) and not own:
            raise UserError(
                f"{path} is no report of lora-lightning, and would be replaced by one: move it "
                "away."
            )


def written(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        atomic_write(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}.") from None


def first_line(text: Any) -> str:
    """Return the first line of an error, or "" if there is none."""
    lines = str(text or "").strip().splitlines()
    return lines[0].removeprefix("UserError: ") if lines else ""


def _cells(values: list[str]) -> str:
    return f"| {' | '.join(map(one_line, values))} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(value: str) -> str:
    """Return a sampled number to four digits, and any other value unchanged."""
    try:
        return _number(float(value)) if len(value) > 8 else value
    except ValueError:
        return value


def _whole(value: float | None) -> str:
    return _with(value, "{:,.0f}")


def _with(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
