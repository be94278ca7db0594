"""Successive halving: all jobs train a little, the better ones more, the best to the end.

Jamieson and Talwalkar 2016 (arXiv:1502.07943); where several jobs run at a time, asynchronous as in
Li et al. 2020 (arXiv:1810.05934): a free place takes the best of those that have come so far. A job
pauses at a rung with a checkpoint and goes on from it exactly, so that nothing is trained twice.
Pruners of hyperparameter libraries can stop a trial, but not pause it until others have come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.config.schema import PAUSE
from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.atomic_write import write_json

from .queue import Job

DEFAULTS: dict[str, Any] = {"eta": 2, "rungs": 3, "min_resource": None}


@dataclass(frozen=True)
class Halving:
    """Who goes on from where.

    Args:
        eta: of the jobs that reach a rung, one in eta goes on.
        rungs: number of rungs.
        sign: 1 where more of the metric is better, else -1.
        min_resource: share of all steps at which the first rung is, the next at eta times that,
            and so on; None: eta ** -rungs, so that the steps after the last rung are eta times
            those before it.
    """

    eta: int
    rungs: int
    sign: int
    min_resource: float | None = None

    @classmethod
    def of(cls, settings: Any, mode: str) -> Halving | None:
        """From the launcher's settings; None where there are none.

        Raises:
            UserError: they make no sense.
        """
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise UserError(
                "launcher.halving takes eta, rungs and min_resource, such as "
                f"'launcher.halving={{eta: 2, rungs: 3}}', got {settings!r}."
            )
        for name in settings:
            if name not in DEFAULTS:
                raise UserError(
                    f"launcher.halving takes eta, rungs and min_resource, and no {name!r}."
                    f"{did_you_mean(str(name), DEFAULTS)}"
                )
        values = {**DEFAULTS, **settings}
        for name, least in (("eta", 2), ("rungs", 1)):
            if not isinstance(values[name], int) or values[name] < least:
                raise UserError(
                    f"launcher.halving.{name} must be a whole number of at least {least}, got "
                    f"{values[name]!r}."
                )
        eta, rungs, first = values["eta"], values["rungs"], values["min_resource"]
        most = float(eta) ** (1 - rungs)  # the last rung is before the end
        if first is not None and not (isinstance(first, (int, float)) and 0 < first < most):
            raise UserError(
                f"launcher.halving.min_resource is the share of all steps at which the first rung "
                f"is: above 0 and, for {rungs} rungs of eta={eta}, below {most:.3g}, got {first!r}."
            )
        return cls(eta, rungs, -1 if mode == "min" else 1, first)

    def check(self, jobs: list[Job]) -> None:
        """Makes sure that jobs which have paused did so where these settings say.

        Raises:
            UserError: they were begun with other settings.
        """
        for job in jobs:
            for rung, found in enumerate(job.rungs()):
                if found.get("share") not in (None, self.share(rung)):
                    raise UserError(
                        f"{job.folder} paused at {found['share']:.3g} of its steps, by another "
                        "launcher.halving. Give that one, launcher.halving=null to train all jobs "
                        "to their end, or another folder: hydra.sweep.dir=DIR."
                    )

    def pause_at(self, job: Job) -> float | None:
        """Share of all steps at which the job is to pause next; None: it goes to its end."""
        rung = len(job.rungs())
        return self.share(rung) if rung < self.rungs else None

    def share(self, rung: int) -> float:
        """Share of all steps at which a rung is."""
        first = self.eta**-self.rungs if self.min_resource is None else self.min_resource
        return float(first * self.eta**rung)

    def choose(self, jobs: list[Job], *, idle: bool) -> list[Job]:
        """Jobs to train on now: those that have not begun, else the best of the highest rung.

        Args:
            jobs: all jobs.
            idle: whether none is running, so that nothing more is to be waited for.
        """
        waiting = [job for job in jobs if job.state == "waiting"]
        if waiting:
            return waiting
        for rung in reversed(range(self.rungs)):
            order = self.order(jobs, rung)
            beyond = any(len(job.rungs()) > rung + 1 or job.state != "paused" for job in order)
            count = len(order) // self.eta
            if count == 0 and idle and not beyond:
                count = 1
            chosen = [job for job in order[:count] if job.state == "paused" and self._at(job, rung)]
            if chosen:
                return chosen
        return []

    def order(self, jobs: list[Job], rung: int) -> list[Job]:
        """Jobs that have reached a rung, the best first; of equals that of the lower loss."""
        reached = [job for job in jobs if len(job.rungs()) > rung]
        return sorted(
            reached,
            key=lambda job: (
                -self.sign * self._value(job, rung),
                float(job.rungs()[rung].get("loss", math.inf)),
            ),
        )

    def _value(self, job: Job, rung: int) -> float:
        value = float(job.rungs()[rung]["value"])
        return value if math.isfinite(value) else -self.sign * math.inf

    @staticmethod
    def _at(job: Job, rung: int) -> bool:
        return len(job.rungs()) == rung + 1

    def prepare(self, job: Job) -> None:
        """Tells a job where to pause."""
        at = self.pause_at(job)
        path = job.folder / PAUSE
        if at is None:
            path.unlink(missing_ok=True)
        else:
            write_json(path, {"at": at, "rungs": [self.share(rung) for rung in range(self.rungs)]})

    def stop(self, jobs: list[Job]) -> None:
        """Marks the jobs that are left behind, with when and why."""
        for job in jobs:
            if job.state != "paused":
                continue
            rung = len(job.rungs()) - 1
            order = self.order(jobs, rung)
            on = sum(not self._at(other, rung) or other.state == "completed" for other in order)
            last = job.rungs()[rung]
            result = job.result()
            result["status"] = job.state = "stopped"
            result["stopped"] = (
                f"at step {last['step']} of {last['planned']}, {last['monitor']} "
                f"{last['value']:.4f}: place {order.index(job) + 1} of {len(order)}, "
                f"of which {on} went on"
            )
            write_json(job.folder / "result.json", result)
            (job.folder / PAUSE).unlink(missing_ok=True)
