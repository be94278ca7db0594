"""The folder of a run: the names of its files, and its protection from mistakes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_lightning.errors import UserError

from .locks import LOCK, locked
from .logs import read_json
from .output_folders import create_folder

LAST, PREVIOUS = "last.ckpt", "last-previous.ckpt"
"""Names of the checkpoint that a run resumes from, and of the one before it."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run or of a sweep's job.

    Args:
        path: Path of the folder.
    """

    path: Path

    ENTRIES: ClassVar = (
        *(".hydra", "result.json", "bad_step.json"),
        *("checkpoints", "tensorboard", "csv", "samples.jsonl"),
    )
    """Names that a run makes before its adapter."""
    OWN: ClassVar = (*ENTRIES, "pause.json", "adapter")
    """Names that no other command may write and no new run may find."""

    @property
    def hydra(self) -> Path:
        """Hydra's folder, with the config of the run."""
        return self.path / ".hydra"

    @property
    def config(self) -> Path:
        """The config of the run."""
        return self.hydra / "config.yaml"

    @property
    def hydra_config(self) -> Path:
        """Hydra's own config."""
        return self.hydra / "hydra.yaml"

    @property
    def overrides(self) -> Path:
        """The overrides that were typed."""
        return self.hydra / "overrides.yaml"

    @property
    def result(self) -> Path:
        """Status, metrics, time and memory of the run."""
        return self.path / "result.json"

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter or model."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Curves of the run."""
        return self.path / "csv" / "metrics.csv"

    @property
    def samples(self) -> Path:
        """Predictions of a few rows after each validation."""
        return self.path / "samples.jsonl"

    @property
    def bad_step(self) -> Path:
        """Rows of a step whose loss was not a number."""
        return self.path / "bad_step.json"

    @property
    def pause(self) -> Path:
        """Share of all steps at which a job pauses (successive halving)."""
        return self.path / "pause.json"

    @property
    def log(self) -> Path:
        """Output of a job's process."""
        return self.path / "log.txt"

    @property
    def replaced_files(self) -> list[Path]:
        """Files that the holder of the folder's lock writes beside their final path."""
        files = [self.result, self.bad_step, self.pause, self.samples, self.metrics]
        return [*files, self.checkpoints / "*.ckpt", self.config, self.hydra_config, self.overrides]

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from, or None if the run was stopped before the first."""
        paths = (self.checkpoints / name for name in (LAST, PREVIOUS))
        return next((path for path in paths if path.is_file()), None)

    def read_result(self) -> dict[str, Any]:
        """Return the content of result.json so far, or {} if it is absent or damaged."""
        return read_json(self.result)

    def completed_result(self) -> dict[str, Any] | None:
        """Return the result of a completed run, or None if it is not completed."""
        result = self.read_result()
        return result if result.get("status") == "completed" else None

    def has_begun(self) -> bool:
        """Return whether a run has begun here."""
        return "config_hash" in self.read_result() or self.last_checkpoint() is not None

    def create(self) -> None:
        """Make the folder, and check that a checkpoint will fit.

        Raises:
            UserError: If the folder cannot be written, or the disk is nearly full.
        """
        try:
            create_folder(self.path)
            probe, path = tempfile.mkstemp(prefix=".writable-", dir=self.path)  # follows no link
            os.close(probe)
            os.unlink(path)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise UserError(f"output_dir={self.path} cannot be written: {error}.") from None
        if free < 2**26:
            raise UserError(
                f"output_dir={self.path}: only {free / 2**20:.0f} MiB are free on its disk, too "
                "little for checkpoints. Free some space, or choose another output_dir."
            )

    @contextmanager
    def rollback_on_mistake(self, *, always: bool = False) -> Iterator[None]:
        """Lock the folder, and remove its new files if the block ends in a mistake of the user.

        Files that existed before stay. New files also stay if the run has reached a checkpoint, or
        a step whose rows it has saved.

        Args:
            always: Whether to remove the new files however the block ends. Defaults to False.

        Raises:
            UserError: If the folder cannot be written, or another process works in it.
        """
        parents = (self.path, *self.path.parents)
        new_folders = [folder for folder in parents if not folder.exists()]
        undo, lock = always, self.path / LOCK
        try:
            self.create()
            is_new = not lock.exists()
            with locked(self.path, setting="output_dir"):
                new = [self.path / name for name in self.ENTRIES]
                new = [path for path in new if not path.exists()] + ([lock] if is_new else [])
                try:
                    yield
                except UserError:
                    trained = any(self.checkpoints.glob("*")) or self.bad_step.exists()
                    undo = always or not trained
                    raise
                finally:  # clean up under the lock, before another process begins here
                    for path in new if undo else ():
                        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        finally:
            for folder in new_folders:
                with suppress(OSError):  # the folder is not empty
                    folder.rmdir()


def check_not_in_run(output: Path) -> None:
    """Raise UserError if a run has, or will have, files of its own at an output path."""
    output = Path(os.path.realpath(output))  # realpath accepts a cycle of links
    for path in output.parents:
        run = RunFolder(path)
        entry = output.relative_to(path).parts[0]
        if entry in RunFolder.OWN and (run.result.is_file() or run.hydra.is_dir()):
            raise UserError(
                f"{output}: is in the run {path}, which keeps its own files there. Choose another "
                "place."
            )
