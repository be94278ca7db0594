"""Entries of a run's folder: their names, and their protection from mistakes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_lightning.config.schema import PAUSE
from lora_lightning.errors import UserError
from lora_lightning.utils.locks import LOCK, locked
from lora_lightning.utils.output_folders import made_folder

ADAPTER = "adapter"
"""Entry of a run's folder: the folder of the trained adapter or model."""
RESULT = "result.json"
HYDRA = ".hydra"
BAD_STEP = "bad_step.json"
"""Entry of a run's folder: the rows of a step whose loss was not a number."""
RUN_ENTRIES = (
    *(HYDRA, RESULT, BAD_STEP),
    *("checkpoints", "tensorboard", "csv", "samples.jsonl"),
)
OWN_ENTRIES = (*RUN_ENTRIES, PAUSE, ADAPTER)
"""Entries of a run's folder that no other command may write and no new run may find there."""


def check_not_in_run(output: Path) -> None:
    """Raise UserError if a run has, or will have, files of its own at an output path."""
    output = Path(os.path.realpath(output))  # realpath accepts a cycle of links
    for run_dir in output.parents:
        entry = output.relative_to(run_dir).parts[0]
        is_run = (run_dir / RESULT).is_file() or (run_dir / HYDRA).is_dir()
        if is_run and entry in OWN_ENTRIES:
            raise UserError(
                f"{output}: is in the run {run_dir}, which keeps its own files there. Choose "
                "another place."
            )


@contextmanager
def rollback_on_mistake(run_dir: Path, *, always: bool = False) -> Iterator[None]:
    """Lock a run's folder, and remove its new files if the block ends in a mistake of the user.

    Files that existed before stay. New files also stay if the run has reached a checkpoint, or a
    step whose rows it has saved.

    Args:
        run_dir: Folder of the run. It and its parents are removed again if the block made them.
        always: Whether to remove the new files however the block ends. Defaults to False.

    Raises:
        UserError: The folder cannot be written, or another process works in it.
    """
    new_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    undo = always
    try:
        check_writable(run_dir)
        is_new = not (run_dir / LOCK).exists()
        with locked(run_dir, setting="output_dir"):
            new = [path for path in (run_dir / name for name in RUN_ENTRIES) if not path.exists()]
            new += [run_dir / LOCK] if is_new else []
            try:
                yield
            except UserError:
                trained = any((run_dir / "checkpoints").glob("*")) or (run_dir / BAD_STEP).exists()
                undo = always or not trained
                raise
            finally:  # clean up under the lock, before another process begins here
                for path in new if undo else ():
                    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    finally:
        for folder in new_folders:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


def check_writable(run_dir: Path) -> None:
    """Make the folder, and check that a checkpoint will fit.

    Raises:
        UserError: The folder cannot be written, or the disk is nearly full.
    """
    try:
        made_folder(run_dir)
        probe, path = tempfile.mkstemp(prefix=".writable-", dir=run_dir)  # follows no link
        os.close(probe)
        os.unlink(path)
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        raise UserError(f"output_dir={run_dir} cannot be written: {error}.") from None
    if free < 2**26:
        raise UserError(
            f"output_dir={run_dir}: only {free / 2**20:.0f} MiB are free on its disk, too little "
            "for checkpoints. Free some space, or choose another output_dir."
        )
