"""A job of a sweep and its state."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lora_lightning.utils.logs import read_result
from lora_lightning.utils.run_folder import RunFolder


@dataclass
class Job:
    """A job of a sweep and its state."""

    number: int
    overrides: list[str]
    folder: Path
    config: DictConfig = field(default_factory=lambda: DictConfig({}), repr=False)
    """Its composed config, Hydra's part included."""
    name: str = ""
    """Overrides that distinguish the job, because not all jobs have them."""
    state: str = "waiting"
    """waiting, running, completed, failed, interrupted, or kept (completed by an earlier sweep).
    Successive halving adds paused, and stopped for good."""
    status: int | None = None
    """Exit status of its process."""
    seconds: float = 0.0
    retried: int = 0
    """How often the job was restarted after a failure."""
    earlier: int = 0
    """Time of the last write to its result.json before its process began, in ns."""

    def result(self) -> dict[str, Any]:
        """Return its result.json."""
        return read_result(RunFolder(self.folder).result)

    def current_result(self) -> dict[str, Any]:
        """Return its result.json if its current process wrote it, else an empty dict."""
        return self.result() if self.result_time() != self.earlier else {}

    def result_time(self) -> int:
        """Return when its result.json was written, in ns; 0 if it does not exist."""
        try:
            return RunFolder(self.folder).result.stat().st_mtime_ns
        except OSError:
            return 0

    def rungs(self) -> list[dict[str, Any]]:
        """Return the rungs at which it has paused: step, planned steps, and the metric there."""
        return list(self.result().get("rungs", ()))

    def is_mistake(self) -> bool:
        """Return whether the job reports a mistake of the user."""
        return str(self.current_result().get("error", "")).startswith("UserError: ")

    def error(self) -> str:
        """Return the reason for its failure, on one line."""
        error = str(self.current_result().get("error", "")).removeprefix("UserError: ")
        error = error or self._last_line()
        if self.status is not None and self.status < 0:
            killed = self.status == -signal.SIGKILL  # the system logs no reason for this
            verb = "killed (out of memory?)" if killed else "ended"
            error = f"{verb} by {signal.Signals(-self.status).name}. {error}"
        if self.retried:
            error = f"failed {self.retried + 1} times, last error: {error}"
        return " ".join(error.split())[:500] or f"exit status {self.status}"

    def _last_line(self) -> str:
        """Return the last line of its log that is not empty, or ""."""
        log = RunFolder(self.folder).log
        text = log.read_text("utf-8", errors="replace") if log.is_file() else ""
        lines = text.replace("\0", "").split("\n")  # a power cut leaves zero bytes
        return next((line for line in reversed(lines) if line.strip()), "")


def name_jobs(jobs: list[Job]) -> None:
    """Name each job by the overrides that not all jobs have."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        job.name = " ".join(item for item in job.overrides if item not in common)
