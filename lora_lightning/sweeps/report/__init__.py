"""Reports of a sweep: a table in the terminal, results.csv, report.md and report.html.

Reports depend only on the sweep's folder. They can be made at any time, also while the sweep runs.
"""

from __future__ import annotations

from pathlib import Path

from .reading import read_sweep
from .results import Sweep
from .tables import check_report_files, print_report, write_csv, write_markdown


def report(folder: Path) -> Sweep:
    """Print the table of a sweep and write its reports into its folder.

    Args:
        folder: Folder of the sweep, or any folder that holds runs.

    Returns:
        The sweep that was read.

    Raises:
        UserError: the folder holds no run, it cannot be written to, or it holds another program's
            file under the name of a report.
    """
    sweep = read_sweep(folder)
    check_report_files(folder)
    write_csv(sweep, folder / "results.csv")
    write_markdown(sweep, folder / "report.md")
    from .html import write_page  # matplotlib takes a second to import

    write_page(sweep, folder / "report.html")
    print_report(sweep)
    return sweep


__all__ = ["Sweep", "read_sweep", "report"]
