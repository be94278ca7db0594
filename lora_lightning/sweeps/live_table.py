"""Display of a running sweep's jobs: a live table in a terminal, else a line for each change."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_lightning.utils.logs import curve, read_metrics
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import printable

from .job import Job

MAX_ROWS = 20
"""Maximum number of table rows: running jobs first, then the last to end, then paused jobs."""
COLORS = {
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "interrupted": "yellow",
    "paused": "blue",
}


class JobTable:
    """Context manager that shows jobs.

    Args:
        sweep_dir: Folder of the sweep.
        jobs: All jobs.
        monitor: Name of the compared metric.
    """

    def __init__(self, sweep_dir: Path, jobs: list[Job], monitor: str) -> None:
        self.console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
        self.sweep_dir, self.jobs, self.monitor = sweep_dir, jobs, monitor
        self.printed = {job.number: job.state for job in jobs}
        self.live = Live(console=self.console, auto_refresh=False)
        complete = sum(job.state == "kept" for job in jobs)
        already = f", {complete} already complete" if complete else ""
        count = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
        self.console.print(printable(f"Sweep of {count}{already}: {sweep_dir}"))

    def __enter__(self) -> JobTable:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def show(self) -> None:
        """Show the state of the jobs."""
        if self.console.is_terminal:
            self.live.update(self._table(self.jobs), refresh=True)
            return
        for job in self.jobs:
            if self.printed[job.number] != job.state:
                self.printed[job.number] = job.state
                ended = job.state != "running"
                after = f" after {job.seconds:.0f} s, {self._progress(job)[1]}" if ended else ""
                line = f"job {job.number} {job.state}{after}  ({job.name})"
                self.console.print(printable(line))

    def _table(self, jobs: list[Job]) -> Table:
        table = Table()
        for column in ("job", "overrides", "state", "step", "latest", "time"):
            table.add_column(column)
        running = [job for job in jobs if job.state == "running"]
        paused = [job for job in jobs if job.state == "paused"]
        ended = [job for job in jobs if job.state not in ("running", "waiting", "paused")]
        other = [
            f"{count} {state}"
            for state in ("paused", "waiting")
            if (count := sum(job.state == state for job in jobs))
        ]
        rows = (running + ended[::-1] + paused)[:MAX_ROWS]
        for job in sorted(rows, key=lambda job: job.number):
            step, latest = self._progress(job)
            name, latest = printable(job.name), printable(latest)
            state = Text(job.state, style=COLORS.get(job.state, "default"))
            table.add_row(str(job.number), name, state, step, latest, f"{job.seconds:.0f} s")
        table.caption = ", ".join([f"{len(ended)} ended", f"{len(running)} running", *other])
        return table

    def _progress(self, job: Job) -> tuple[str, str]:
        """Return the step of a job, and its monitored metric or, before that exists, its loss."""
        result = job.result()
        if result.get("objective") is not None:
            monitor = result.get("monitor", self.monitor)
            return str(result.get("steps", "")), f"{monitor} {result['objective']:.4f}"
        if job.state in ("paused", "stopped") and job.rungs():
            rung = job.rungs()[-1]
            return str(rung["step"]), f"{rung['monitor']} {rung['value']:.4f}"
        rows, _ = read_metrics(RunFolder(job.folder).metrics)
        for name in (self.monitor, "val/loss", "train/loss"):
            if points := curve(rows, name):
                return rows[-1]["step"], f"{name} {points[-1][1]:.4f}"
        return "", "-"
