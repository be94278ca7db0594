"""What a module adds to its checkpoints, and compares when a checkpoint is loaded."""

from __future__ import annotations

import inspect
import sys
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from lora_lightning.config.untrusted import arguments_from_file
from lora_lightning.distributed.strategies import data_ranks
from lora_lightning.errors import UserError
from lora_lightning.tasks import Task
from lora_lightning.utils.terminal import say

from .checkpoint_validation import check_optimizer
from .checkpointing import read_checkpoint
from .lightning_internals import attached_trainer
from .optim import adopt_implementation

if TYPE_CHECKING:
    from .module import LoraModule

RANKS, ROWS = "data_ranks", "rows"
"""Checkpoint keys: the number of ranks that see different rows, and the rows' fingerprint."""
HYPER_PARAMETERS = L.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY


def add_origin(checkpoint: dict[str, Any], module: LoraModule) -> None:
    """Add what a resumed run compares: the task's state, the ranks and the training rows."""
    # Among the arguments, load_from_checkpoint can build the model's head from it.
    checkpoint[HYPER_PARAMETERS]["task_state"] = module.task.state()
    if module.lora_from_data is not None:
        checkpoint[HYPER_PARAMETERS]["lora"] = asdict(module.lora_from_data)
    checkpoint[RANKS] = data_ranks(module.trainer)
    checkpoint[ROWS] = _rows_fingerprint(module.trainer)


def _rows_fingerprint(trainer: L.Trainer) -> str | None:
    """Return the fingerprint of the training rows' content, or None if it is unknown."""
    rows = getattr(getattr(trainer, "datamodule", None), "encoded", {}).get("train")
    return getattr(rows, "_fingerprint", None)


def check_fits(checkpoint: dict[str, Any], module: LoraModule) -> None:
    """Check that a checkpoint fits a module and, if it is being fit, its run.

    Raises:
        UserError: If the checkpoint has another task state, other ranks or another optimizer.
    """
    saved = checkpoint.get(HYPER_PARAMETERS, {}).get("task_state")
    if saved is None:
        raise UserError("this checkpoint was not written by lora_lightning.")
    trainer = attached_trainer(module)
    if trainer is not None and trainer.state.fn == "fit":
        _check_ranks_and_rows(checkpoint, trainer)
        with module.whole_adapter():
            optimizer = module.build_optimizer()
        check_optimizer(checkpoint.get("optimizer_states"), optimizer)
        adopt_implementation(checkpoint["optimizer_states"][0]["param_groups"], optimizer)
    if saved != module.task.state():
        raise UserError(
            "the data or its labels differ from those that the checkpoint was trained with: "
            f"{saved} then, {module.task.state()} now."
        )


def _check_ranks_and_rows(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuse another number of ranks, and report other training rows."""
    now = data_ranks(trainer)
    if checkpoint.get(RANKS, now) != now:
        raise UserError(
            f"the checkpoint was written by {checkpoint[RANKS]} processes with different rows, and "
            f"this run has {now}, so its steps would use other batches. Resume with as many "
            "processes, or start a new run: adapter=CHECKPOINT.ckpt."
        )
    rows = _rows_fingerprint(trainer)
    if rows is not None and checkpoint.get(ROWS) not in (None, rows):
        say(
            "the training data, or how they are read, have changed since this checkpoint was "
            "written: the resumed run learns from other rows.",
            file=sys.stderr,
        )


def restore_task(task: Task, state: dict[str, Any]) -> None:
    """Restore a task's state from a possibly forged checkpoint.

    Raises:
        UserError: If the state is not one of this task.
    """
    try:
        task.restore(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"task_state is not a state of task={task.name}: {error!r}. Use the checkpoint as its "
            "run wrote it."
        ) from None


def checked_copy(
    path: str | Path, cls: type, base: type, *, typed: dict[str, Any]
) -> tuple[BytesIO, dict[str, Any]]:
    """Return the weights of a possibly untrusted checkpoint as a file, and its checked settings.

    Args:
        path: Path of the checkpoint.
        cls: Class to build.
        base: Base class, whose arguments runs write into checkpoints.
        typed: Arguments of the caller, which take precedence.

    Raises:
        UserError: If the file is damaged, or holds settings that a run does not write.
    """
    content = read_checkpoint(path)
    known = inspect.signature(base.__init__).parameters  # type: ignore[misc]
    own = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    settings = arguments_from_file(
        content.pop(HYPER_PARAMETERS, {}),
        path,
        typed=typed,
        added=[name for name in own if name not in known],
    )
    weights = {"state_dict": content["state_dict"], "pytorch-lightning_version": L.__version__}
    file = BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return file, settings
