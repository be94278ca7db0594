"""What came out of a sweep: a table in the terminal, results.csv, report.md and report.html.

All of it is a function of the sweep's folder, so that it can be made again at any time, also while
the sweep still runs.
"""

from __future__ import annotations

from pathlib import Path

from .results import Sweep, read_sweep
from .tables import (
    refuse_others,
    terminal_report,
    write_csv,
    write_markdown,
)


def report(folder: Path) -> Sweep:
    """Prints the table of a sweep and writes its reports into its folder.

    Args:
        folder: a sweep's folder, or any that holds runs.

    Returns:
        What was read.

    Raises:
        UserError: there is no run in the folder, it cannot be written to, or it holds a file that
            another has written under the name of a report.
    """
    sweep = read_sweep(folder)
    refuse_others(folder)
    write_csv(sweep, folder / "results.csv")
    write_markdown(sweep, folder / "report.md")
    from .html import write_page  # matplotlib takes a second to import

    write_page(sweep, folder / "report.html")
    terminal_report(sweep)
    return sweep


__all__ = ["Sweep", "read_sweep", "report"]
