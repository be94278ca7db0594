"""Successive halving: all jobs train a little, the better ones more, the best to the end.

The method is from Jamieson and Talwalkar 2016 (arXiv:1502.07943). If several jobs run at a time, it
is asynchronous as in Li et al. 2020 (arXiv:1810.05934): a free place takes the best job among those
that have reached a rung. A job pauses at a rung with a checkpoint and resumes from it exactly, so
nothing is trained twice. Pruners of hyperparameter libraries can stop a trial, but cannot pause it
until others have reached the same rung.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.utils.atomic_write import write_json
from lora_lightning.utils.run_folder import RunFolder

from .job import Job

DEFAULTS: dict[str, Any] = {"eta": 2, "rungs": 3, "min_resource": None}


@dataclass(frozen=True)
class Halving:
    """Rule for which jobs continue beyond which rung.

    Args:
        eta: One in eta of the jobs that reach a rung continues.
        rungs: Number of rungs.
        sign: 1 if a higher metric is better, else -1.
        min_resource: Fraction of all steps at the first rung. Each further rung is at eta times the
            fraction before it. None by default: eta ** -rungs, so the whole training takes eta
            times the steps up to the last rung.
    """

    eta: int
    rungs: int
    sign: int
    min_resource: float | None = None

    @classmethod
    def from_settings(cls, settings: Any, mode: str) -> Halving | None:
        """Create the rule from the launcher's settings; return None if there are none.

        Raises:
            UserError: the settings are invalid.
        """
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise UserError(
                f"launcher.halving={settings!r}: must be a mapping of eta, rungs and min_resource, "
                "for example 'launcher.halving={eta: 2, rungs: 3}'."
            )
        for name in settings:
            if name not in DEFAULTS:
                raise UserError(
                    f"launcher.halving.{name}: not found; the settings are eta, rungs and "
                    f"min_resource.{did_you_mean(str(name), DEFAULTS)}"
                )
        values = {**DEFAULTS, **settings}
        for name, least in (("eta", 2), ("rungs", 1)):
            if not isinstance(values[name], int) or values[name] < least:
                raise UserError(
                    f"launcher.halving.{name}={values[name]!r}: must be an integer of at least "
                    f"{least}."
                )
        eta, rungs, first = values["eta"], values["rungs"], values["min_resource"]
        limit = float(eta) ** (1 - rungs)  # the last rung must be before the end
        if first is not None and not (isinstance(first, (int, float)) and 0 < first < limit):
            raise UserError(
                f"launcher.halving.min_resource={first!r}: must be above 0 and, for {rungs} rungs "
                f"with eta={eta}, below {limit:.3g}. It is the fraction of all steps before the "
                "first rung."
            )
        return cls(eta, rungs, -1 if mode == "min" else 1, first)

    def check(self, jobs: list[Job]) -> None:
        """Check that paused jobs have paused where these settings place the rungs.

        Raises:
            UserError: the jobs were begun with other settings.
        """
        for job in jobs:
            for number, rung in enumerate(job.rungs()):
                if rung.get("share") not in (None, self.fraction(number)):
                    raise UserError(
                        f"launcher.halving: {job.folder} paused at {rung['share']:.3g} of its "
                        "steps, with another launcher.halving. Use the earlier setting, "
                        "launcher.halving=null to train all jobs to their end, or another folder: "
                        "hydra.sweep.dir=DIR."
                    )

    def pause_at(self, job: Job) -> float | None:
        """Return the fraction of steps at which the job pauses next; None: it trains to its end."""
        rung = len(job.rungs())
        return self.fraction(rung) if rung < self.rungs else None

    def fraction(self, rung: int) -> float:
        """Return the fraction of all steps at which a rung is."""
        first = self.eta**-self.rungs if self.min_resource is None else self.min_resource
        return float(first * self.eta**rung)

    def choose(self, jobs: list[Job], *, idle: bool) -> list[Job]:
        """Return the jobs to train now: those not begun, else the best of the highest rung.

        Args:
            jobs: All jobs.
            idle: Whether no job is running, so that there is nothing to wait for.
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
        """Return the jobs that have reached a rung, the best first; the lower loss breaks ties."""
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
        """Write to a job's folder where the job pauses."""
        at = self.pause_at(job)
        path = RunFolder(job.folder).pause
        if at is None:
            path.unlink(missing_ok=True)
        else:
            write_json(
                path, {"at": at, "rungs": [self.fraction(rung) for rung in range(self.rungs)]}
            )

    def stop(self, jobs: list[Job]) -> None:
        """Mark the jobs left behind as stopped, with step and reason."""
        for job in jobs:
            if job.state != "paused":
                continue
            rung = len(job.rungs()) - 1
            order = self.order(jobs, rung)
            continued = sum(
                not self._at(other, rung) or other.state in ("completed", "kept") for other in order
            )
            last = job.rungs()[rung]
            result = job.result()
            result["status"] = job.state = "stopped"
            result["stopped"] = (
                f"at step {last['step']} of {last['planned']}, {last['monitor']} "
                f"{last['value']:.4f}: place {order.index(job) + 1} of {len(order)}; "
                f"{continued} continued"
            )
            write_json(RunFolder(job.folder).result, result)
            RunFolder(job.folder).pause.unlink(missing_ok=True)
