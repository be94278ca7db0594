"""The report as a single file, report.html, which loads nothing from elsewhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lora_lightning.utils.terminal import printable

from .plots import plots
from .results import Sweep
from .tables import (
    best_lines,
    first_line,
    made_with,
    rows_by_run,
    rows_by_setting,
    stopped_lines,
    written,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e1e6eb; text-align: left;
         white-space: nowrap; }
th { background: #f4f6f8; } tr.best td { background: #e8f1fa; }
.wide { overflow-x: auto; } code { background: #f4f6f8; padding: .1rem .3rem; }
.failed { color: #c0392b; } .note { color: #5b6773; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; } .plots svg { max-width: 100%;
         height: auto; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
"""


def write_page(sweep: Sweep, path: Path) -> None:
    """Write the HTML page of a sweep."""
    written(path, printable(page(sweep)))


def page(sweep: Sweep) -> str:
    """Return the page as HTML."""
    title = f"Sweep {sweep.folder.resolve().name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(sweep.runs)} runs: {escape(sweep.counts())}. {escape(str(sweep.folder))}</p>",
    ]
    if sweep.best is not None:
        items = "".join(
            f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>"
            for name, text in best_lines(sweep.best, sweep)
        )
        parts.append(f"<dl>{items}</dl>")
    if sweep.failed:
        parts.append("<h2>Failures</h2>")
        parts += [
            f'<p class="failed">job {escape(run.job)} '
            f"({escape(' '.join(f'{key}={run.given.get(key)}' for key in sweep.varied))}): "
            f"{escape(first_line(run.result.get('error')))}</p>"
            for run in sweep.failed
        ]
    if stopped_lines(sweep):
        parts.append("<h2>Stopped early</h2>")
        parts += [f"<p>{escape(line)}</p>" for line in stopped_lines(sweep)]
    note = "Seeds as mean ± deviation of a sample." if "seed" in sweep.varied else ""
    parts.append(f'<h2>Settings, the best first</h2><p class="note">{note}</p>')
    parts.append(_table([dict(row) for row in rows_by_setting(sweep)], best=0))
    figures = "".join(
        f'<section><h2>{escape(name)}</h2><p class="note">{escape(text)}</p>{svg}</section>'
        for name, text, svg in plots(sweep)
    )
    parts.append(f'<div class="plots">{figures}</div>')
    if made_with(sweep):
        parts.append(f'<p class="note">Made with {escape(made_with(sweep))}.</p>')
    parts.append("<h2>All runs</h2>")
    every = [
        {
            name: _text(value)
            for name, value in row.items()
            if name not in ("error", "config_hash", "stopped")
        }
        for row in rows_by_run(sweep)
    ]
    parts.append(_table(every))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(rows: list[dict[str, str]], best: int | None = None) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        f"<tr{' class=best' if index == best else ''}>"
        + "".join(f"<td>{escape(value)}</td>" for value in row.values())
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
