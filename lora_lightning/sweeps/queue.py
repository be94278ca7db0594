"""Queue of a sweep: its processes are started as devices become free, watched, and stopped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from lora_lightning.utils.terminal import say

from .job import Job
from .job_process import EXIT_USER_ERROR, Work

PATIENCE = 30.0
"""Seconds that a job has to save its state after it is asked to stop."""


class JobQueue:
    """Queue that runs each piece of work in its own process, one process per place at a time.

    Args:
        jobs: All jobs of the sweep.
        next_work: Function that returns the next work, called whenever a place is free. Its
            argument says whether nothing is running.
        places: GPUs of each place (entries of CUDA_VISIBLE_DEVICES), or None on a CPU.
        fail_fast: Whether a failure stops the other jobs. False by default.
        retries: How often a failed job is restarted, unless the user made a mistake. 0 by default.
        show: Function called after each change, and every half second. Does nothing by default.
        inherit: File descriptors that the processes keep open. None by default.
    """

    def __init__(
        self,
        jobs: list[Job],
        next_work: Callable[[bool], list[Work]],
        places: list[tuple[str, ...] | None],
        *,
        fail_fast: bool = False,
        retries: int = 0,
        show: Callable[[], None] = lambda: None,
        inherit: tuple[int, ...] = (),
    ) -> None:
        self.jobs, self.next_work = jobs, next_work
        self.waiting: list[Work] = []
        self.running: list[Work] = []
        self.free = list(places)
        self.fail_fast, self.retries = fail_fast, retries
        self.show = show
        self.inherit = inherit
        self._show_failed = False
        is_shared_cpu = len(places) > 1 and places[0] is None
        self.threads = max(1, (os.cpu_count() or 1) // len(places)) if is_shared_cpu else None

    def run(self) -> None:
        """Run until all work has ended.

        If an exception interrupts it, the running jobs save their state first.
        """
        try:
            while self._advance():
                self._show()
                time.sleep(0.5)
        finally:
            self._stop_all()
            self._show()

    def _show(self) -> None:
        """Show the state of the jobs.

        An error of the display is reported once, and ends no job.
        """
        try:
            self.show()
        except BrokenPipeError:  # nobody reads the output anymore
            raise
        except Exception as error:
            if not self._show_failed:
                say(f"warning: the jobs cannot be shown: {error!r}", file=sys.stderr)
            self._show_failed = True

    def _advance(self) -> bool:
        """Collect ended work and start more; return whether there is more to do."""
        for work in list(self.running):
            if work.poll():
                self.running.remove(work)
                self.free.append(work.devices)
                self._retry(work)
        if self.fail_fast and any(job.state == "failed" for job in self.jobs):
            return False
        while self.free:
            self.waiting = self.waiting or self.next_work(not self.running)
            if not self.waiting:
                break
            work = self.waiting.pop(0)
            work.start(self.free.pop(0), threads=self.threads, inherit=self.inherit)
            self.running.append(work)
        return bool(self.running)

    def _retry(self, work: Work) -> None:
        """Set the failed jobs of a process to waiting again, each as often as allowed."""
        for job in work.jobs:
            # A full disk or a killed worker also ends with the exit status of a user's mistake.
            mistake = job.is_mistake() or (
                job.status == EXIT_USER_ERROR and not job.current_result()
            )
            if job.state == "failed" and not mistake and job.retried < self.retries:
                job.state, job.retried = "waiting", job.retried + 1

    def _stop_all(self) -> None:
        for work in self.running:
            work.request_stop()
        until = time.monotonic() + PATIENCE
        for work in self.running:
            work.stop(max(0.0, until - time.monotonic()))
        self.running = []
