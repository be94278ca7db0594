"""The callback that pauses a run of a sweep at a rung of successive halving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lora_lightning.lora import UserError
from lora_lightning.utils.logs import read_json
from lora_lightning.utils.run_folder import RunFolder


class Paused(Exception):
    """A pause of a run that has saved its state at a rung of successive halving.

    Args:
        rung: Requested share of all steps, step, planned steps, and name and value of the
            monitored metric there.
    """

    def __init__(self, rung: dict[str, Any]) -> None:
        super().__init__(f"paused at step {rung['step']} of {rung['planned']}")
        self.rung = rung


class HalvingPause(Callback):
    """A callback that measures a run at a rung, where `LastCheckpoint` saves and ends it.

    Args:
        share: The rung, as a share of all optimizer steps. The run pauses at the validation
            nearest to it.
        rungs: All rungs of the sweep, as shares of all steps.
        monitor: Metric that the sweep compares.
    """

    def __init__(self, share: float, rungs: list[float], monitor: str) -> None:
        self.share, self.rungs, self.monitor = share, rungs, monitor
        self.rung: dict[str, Any] | None = None
        """What was measured at the rung, or None before it."""
        self._validated_at = 0

    @classmethod
    def requested(cls, run_dir: Path, monitor: str) -> HalvingPause | None:
        """Return the pause that the run's sweep requests in a file of its folder, or None.

        Raises:
            UserError: If the file is damaged.
        """
        path = RunFolder(run_dir).pause
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            rungs = [float(share) for share in content["rungs"]]
            return cls(float(content["at"]), rungs, monitor)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} is damaged. Run the sweep's command again, which writes it again; or "
                "delete it, and the job trains to its end."
            ) from None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_at = trainer.global_step
        planned = int(trainer.estimated_stepping_batches)
        if self.share * planned < 1:
            raise UserError(
                f"launcher.halving: a rung at {self.share:.3g} of {planned} optimizer steps is "
                "less than one step. Give fewer rungs, a smaller eta, or a larger min_resource."
            )
        interval = _steps_between_validations(trainer)
        at = [interval * max(1, math.ceil(rung * planned / interval - 0.5)) for rung in self.rungs]
        if len({*at, planned}) <= len(at) or (at and max(at) >= planned):
            raise UserError(
                f"launcher.halving: rungs at {', '.join(f'{rung:.3g}' for rung in self.rungs)} of "
                f"{planned} optimizer steps need a validation each, before the last step, and "
                f"there is one every {interval:g} steps. Validate more often, "
                "trainer.val_check_interval=0.5 or less, or give fewer rungs."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        planned = int(trainer.estimated_stepping_batches)
        interval = trainer.global_step - self._validated_at
        self._validated_at = trainer.global_step
        near = trainer.global_step >= self.share * planned - interval / 2
        if near and self.monitor in trainer.callback_metrics:
            self.rung = {
                "share": self.share,
                "step": trainer.global_step,
                "planned": planned,
                "monitor": self.monitor,
                "value": float(trainer.callback_metrics[self.monitor]),
                "loss": float(trainer.callback_metrics.get("val/loss", math.inf)),
            }


def _steps_between_validations(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps from one validation to the next."""
    count, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    between = float(trainer.val_check_batch or math.inf)
    if trainer.check_val_every_n_epoch is None:  # counted over all epochs
        return between / count
    if between < batches:
        return between / count
    return math.ceil(batches / count) * trainer.check_val_every_n_epoch
