"""Checks before the first step of a resumed run, which refuse state that is not its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from lora_lightning.config.saved import settings_to_retype
from lora_lightning.errors import (
    FULL_ERROR,
    ProcessLost,
    UserError,
    lack_of_memory,
)
from lora_lightning.utils.atomic_write import fault_of_disk

from .checkpoint_validation import describe_mismatch
from .lightning_internals import restore_steps

_OWN = ("lightning.", "lora_lightning.")
"""Modules whose callbacks keep states of a fixed form. States of a user's callbacks may vary."""


@contextmanager
def blame_config_before_first_step(
    saved: Path, config: DictConfig, has_begun: Callable[[], bool]
) -> Iterator[None]:
    """Turn errors before the first step of a resumed run into one error about its config.

    How Lightning and torch treat a value is not known before they get it. An error of the user's
    own code is left alone. Such code consists of classes and a base model that were typed again.

    Args:
        saved: The file that the config was read from.
        config: Content of that file.
        has_begun: Function that returns whether the first step has begun.

    Raises:
        UserError: If another error occurs before the first step. That error is its cause.
    """
    try:
        yield
    except ProcessLost:
        raise
    except UserError as error:
        if not has_begun() and str(saved.parent.parent) not in str(error):
            error.args = (f"{error} The run's settings are in {saved}.",)
        raise
    except Exception as error:
        if has_begun() or _is_in_typed_code(error, config):
            raise
        if fault_of_disk(error) is not None or lack_of_memory(error) is not None:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".: ")
        raise UserError(
            f"the run cannot be built from {saved}: {reason}. Correct the value that was changed, "
            f"or start a new run: adapter=CHECKPOINT.ckpt. {FULL_ERROR}=1 shows the traceback."
        ) from error


def _is_in_typed_code(error: BaseException, config: DictConfig) -> bool:
    """Return whether an error passed through code that a resumed run uses only if typed again."""
    try:
        typed = list(settings_to_retype(config))
    except Exception:  # from interpolations, which are not user code
        return False
    names = {item.partition("=")[2].partition(".")[0] for item in typed if "_target_=" in item}
    names |= {"transformers_modules" for item in typed if item.startswith("model.trust_")}
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] in names:
            return True
        trace = trace.tb_next
    return False


def check_on_restore(
    trainer: L.Trainer, content: dict[str, Any], path: Path, *, then: Callable[[], None]
) -> None:
    """Make a Trainer refuse a checkpoint of another run before the first step.

    Lightning restores weights and callbacks first, then loops and optimizers, then data loaders.
    Before each of the first two stages, the saved states are compared with the run's own. An error
    while restoring is raised again with the checkpoint's name.

    Args:
        trainer: Trainer before `fit`.
        content: Content of the checkpoint, which has passed `check_resumable`.
        path: File of the checkpoint.
        then: Callback for when the weights and the training state fit, before anything is logged.
    """
    states = content["callbacks"]

    def callbacks() -> str | None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = callback.state_key
            own = callback.state_dict() if type(callback).__module__.startswith(_OWN) else None
            if name in states and (problem := describe_mismatch(states[name], own, name)):
                return problem
        return None

    def loops() -> str | None:
        saved, own = content["loops"]["fit_loop"], trainer.fit_loop.state_dict()
        counts = trainer.fit_loop.epoch_progress.total
        if problem := describe_mismatch(saved, own, "fit_loop", of=[counts]):
            return problem
        if problem := _miscounted(saved, own, "fit_loop"):
            return problem
        schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
        states = [each.state_dict() for each in schedules]
        return describe_mismatch(content["lr_schedulers"], states, "lr_schedulers", of=schedules)

    version = content["pytorch-lightning_version"]
    checks = ((callbacks, None), (loops, then), (None, None))
    for (owner, name), (check, after) in zip(restore_steps(trainer), checks, strict=True):
        step = _Step(trainer, getattr(owner, name), check, after, path, version)
        setattr(owner, name, step)


@dataclass
class _Step:
    """One of Lightning's restore steps, which checks the restored state in `fit`."""

    trainer: L.Trainer
    restore: Callable[..., None]
    check: Callable[[], str | None] | None
    after: Callable[[], None] | None
    path: Path
    version: str

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.state.fn != "fit":  # a validation restores nothing
            self.restore(*args, **kwargs)
            return
        try:
            problem = None if self.check is None else self.check()
            if problem is None:
                self.restore(*args, **kwargs)
        except UserError as error:
            if str(self.path) in str(error):
                raise
            raise UserError(f"{self.path}: {error}") from None
        except Exception as error:
            if fault_of_disk(error) is not None or lack_of_memory(error) is not None:
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise _unfit(self.path, problem, self.version) from error
        if problem is not None:
            raise _unfit(self.path, problem, self.version)
        if self.after is not None:
            self.after()


def _unfit(path: Path, problem: str, version: str) -> UserError:
    other = (
        f" It was written by Lightning {version}, and {L.__version__} is installed."
        if version != L.__version__
        else ""
    )
    return UserError(
        f"a run cannot resume from {path}: {problem.rstrip('.')}. The file was changed, or another "
        f"run has written it.{other} For a new run that starts from its weights: "
        "adapter=CHECKPOINT.ckpt."
    )


def _miscounted(saved: Any, own: Any, where: str) -> str | None:
    """Describe what is wrong with the counts of Lightning's loops, or return None.

    All counts must be present and at least 0, and no stage may be ahead of the one before it.
    Lightning itself treats an absent count as 0.
    """
    if not isinstance(own, dict) or not isinstance(saved, dict):
        return None
    if "ready" in own:
        if lost := own.keys() - saved.keys():
            return f"{where} has no {min(lost)!r}"
        counts = [
            saved[name] for name in ("ready", "started", "processed", "completed") if name in own
        ]
        if counts[-1] < 0 or counts != sorted(counts, reverse=True):
            return f"{where} counts {', '.join(f'{name} {saved[name]}' for name in own)}"
    parts = [name for name in own if name in saved]
    problems = (_miscounted(saved[name], own[name], f"{where}.{name}") for name in parts)
    return next((problem for problem in problems if problem), None)
