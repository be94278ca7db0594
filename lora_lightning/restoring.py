"""Resume: the states in a checkpoint are those of this run, or the checkpoint is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from .atomic_write import fault_of_disk
from .checkpoint import unlike
from .lora.errors import UserError

_OWN = ("lightning.", "lora_lightning.")
"""Modules whose callbacks keep states of one form; those of a user's may take any."""


def refuse_unfit(
    trainer: L.Trainer, content: dict[str, Any], path: Path, *, then: Callable[[], None]
) -> None:
    """Have a Trainer refuse a checkpoint that is not of its run, before the first step.

    Lightning restores in three moments: weights and callbacks, then loops and optimizers, then
    data loaders. Before each, the saved states are compared with those that the run has itself. An
    error while restoring them is raised again with the checkpoint's name.

    Args:
        trainer: before `fit`.
        content: the checkpoint, passed by `check_resumable`.
        path: its file.
        then: called when the weights and the training state fit, before anything is logged.
    """
    states = content["callbacks"]

    def callbacks() -> str | None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = callback.state_key
            own = callback.state_dict() if type(callback).__module__.startswith(_OWN) else None
            if name in states and (problem := unlike(states[name], own, name)):
                return problem
        return None

    def loops() -> str | None:
        saved = content["loops"]["fit_loop"]
        if problem := unlike(saved, trainer.fit_loop.state_dict(), "fit_loop", strict=True):
            return problem
        if problem := _disordered(saved, "fit_loop"):
            return problem
        own = [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]
        return unlike(content["lr_schedulers"], own, "lr_schedulers", strict=True)

    connector, loop = trainer._checkpoint_connector, trainer.fit_loop
    for place, name, check, after in (
        (connector, "_restore_modules_and_callbacks", callbacks, None),
        (connector, "restore_training_state", loops, then),
        (loop, "_load_combined_loader_states", None, None),
    ):
        step = _Step(trainer, getattr(place, name), check, after, path)
        setattr(place, name, step)


@dataclass
class _Step:
    """One of Lightning's steps of restoring, in `fit` with a check of what it restores."""

    trainer: L.Trainer
    restore: Callable[..., None]
    check: Callable[[], str | None] | None
    after: Callable[[], None] | None
    path: Path

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.state.fn != "fit":  # a validation restores nothing
            self.restore(*args, **kwargs)
            return
        try:
            problem = None if self.check is None else self.check()
            if problem is None:
                self.restore(*args, **kwargs)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except UserError as error:
            if str(self.path) in str(error):
                raise
            raise UserError(f"{self.path}: {error}") from None
        except Exception as error:
            if fault_of_disk(error) is not None:
                raise
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise _unfit(self.path, problem) from error
        if problem is not None:
            raise _unfit(self.path, problem)
        if self.after is not None:
            self.after()


def _unfit(path: Path, problem: str) -> UserError:
    return UserError(
        f"a run cannot go on from {path}: {problem.rstrip('.')}. It was changed, or something else "
        "than this run has written it. What it has learned is a start for a new run: "
        "adapter=CHECKPOINT.ckpt."
    )


def _disordered(node: Any, where: str) -> str | None:
    """What is wrong with counts of Lightning's loops: none is below zero, or before its start."""
    if not isinstance(node, dict):
        return None
    counts = [node[name] for name in ("ready", "started", "processed", "completed") if name in node]
    if not all(isinstance(count, int) for count in counts):
        return None
    if counts and (counts[-1] < 0 or counts != sorted(counts, reverse=True)):
        return f"{where} counts {', '.join(f'{name} {count}' for name, count in node.items())}"
    for name, part in node.items():
        if problem := _disordered(part, f"{where}.{name}"):
            return problem
    return None
