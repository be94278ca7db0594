"""Lightning's private attributes that training needs, in one place.

They were checked with Lightning 2.6.6. tests/unit/training/test_lightning_internals.py fails if one
is missing.
"""

from __future__ import annotations

from typing import Any

import lightning as L


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the Trainer of a module, or None without one."""
    return module._trainer


def restore_loaders(trainer: L.Trainer) -> None:
    """Restore the saved state of the data loaders once more.

    configure_optimizers asks for the number of steps. For that, Lightning creates the loaders
    before it reads their saved state, and never restores that state.
    """
    trainer.fit_loop._load_combined_loader_states()


def restore_steps(trainer: L.Trainer) -> tuple[tuple[Any, str], ...]:
    """Return the owners and names of the methods that restore a checkpoint in `fit`, in order.

    They restore the weights and callbacks, the loops and optimizers, and the data loaders.
    """
    connector = trainer._checkpoint_connector
    return (
        (connector, "_restore_modules_and_callbacks"),
        (connector, "restore_training_state"),
        (trainer.fit_loop, "_load_combined_loader_states"),
    )


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Skip Lightning's exchange of a SIGTERM, which waits for the device in every step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether the current batch ends without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def counts_after_batch(trainer: L.Trainer, index: int) -> tuple[int, int]:
    """Return Lightning's counts after the batch of that index: batches and logged steps."""
    return index + 1, trainer.fit_loop.epoch_loop._batches_that_stepped


def can_resume_here(trainer: L.Trainer) -> bool:
    """Return whether a run can resume from the end of this batch, when its hooks are called.

    No gradient may be partly accumulated. Lightning does not make up for a validation or an
    epoch's end that is due here.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return not (
        loop._should_accumulate() or loop._is_training_done or loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]
    )


def counts_at_step_end(trainer: L.Trainer) -> tuple[int, int] | None:
    """Return Lightning's counts while it calls the hooks at the end of a step, otherwise None."""
    loop = trainer.fit_loop.epoch_loop
    count = loop.batch_progress.current
    is_there = trainer.training and count.processed == count.completed + 1  # type: ignore[attr-defined]
    if not is_there or not can_resume_here(trainer):
        return None
    return count.processed, loop._batches_that_stepped  # type: ignore[attr-defined]


def reset_counts(trainer: L.Trainer, batches: int, stepped: int) -> None:
    """Reset Lightning's counts to the end of a step, after which no other step was taken.

    Args:
        trainer: Trainer that is in training, after that step.
        batches: Number of batches of this epoch up to the step.
        stepped: Lightning's count of steps for its loggers.
    """
    loop = trainer.fit_loop.epoch_loop
    progress, optimizer = loop.batch_progress, loop.automatic_optimization.optim_progress.optimizer
    since = progress.current.completed - batches
    for count in (progress.current, progress.total):
        count.ready = count.started = count.processed = count.completed - since  # type: ignore[attr-defined]
        count.completed = count.ready - 1
    for steps, cleared in (
        (optimizer.step.current, optimizer.zero_grad.current),
        (optimizer.step.total, optimizer.zero_grad.total),
    ):
        steps.ready = cleared.ready = cleared.started = cleared.completed = steps.completed  # type: ignore[attr-defined]
    # The flag belongs to an unfinished batch and would make Lightning treat the epoch as ended.
    progress.is_last_batch = False
    loop._batches_that_stepped = stepped
    for loader in trainer.fit_loop._combined_loader.flattened:  # type: ignore[union-attr]
        if hasattr(loader, "given"):  # the loader can resume in mid-epoch
            loader.given = batches
