"""What came out of a sweep: a table in the terminal, results.csv, report.md and report.html.

All of it is a function of the sweep's folder, so that it can be made again at any time, also while
the sweep still runs.
"""

from __future__ import annotations

from pathlib import Path

from .sweep import Sweep, read_sweep
from .tables import terminal_report, write_csv, write_markdown


def report(folder: Path) -> Sweep:
    """Prints the table of a sweep and writes its reports into its folder.

    Args:
        folder: a sweep's folder, or any that holds runs.

    Returns:
        What was read.

    Raises:
        UserError: there is no run in the folder, or it cannot be written to.
    """
    sweep = read_sweep(folder)
    write_csv(sweep, folder / "results.csv")
    write_markdown(sweep, folder / "report.md")
    from .page import write_page  # matplotlib takes a second to import

    write_page(sweep, folder / "report.html")
    terminal_report(sweep)
    return sweep


__all__ = ["Sweep", "read_sweep", "report"]
