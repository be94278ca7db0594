"""The callback that keeps the best checkpoints, and synced writing of checkpoints."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lora_lightning.lora import UserError
from lora_lightning.training.checkpointing import (
    check_trainable_values,
    check_written,
)
from lora_lightning.utils.atomic_write import written_beside
from lora_lightning.utils.output_folders import create_folder
from lora_lightning.utils.run_folder import LAST, PREVIOUS


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which verifies each new file before it deletes an older one.

    In any Trainer, files are synced to disk before they get their names. The callback also finds
    them in its own folder after the run was moved.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        sync_checkpoints(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        live = trainer.lightning_module.state_dict()
        if not trainer.is_global_zero:
            return
        try:
            check_trainable_values(live)
            check_written(Path(filepath), live)
        except UserError:
            Path(filepath).unlink(missing_ok=True)
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's record of the best checkpoints, whose files may be deleted later.

        Raises:
            UserError: If the record names a file that this callback does not write, or a score is
                not a number.
        """
        prefix = re.escape((self.filename or "").partition("{")[0])

        def here(path: Any, own: str = prefix) -> str:
            name = Path(path).name if isinstance(path, str) else repr(path)
            fits = re.fullmatch(rf"(?!\.){own}[^/\\\0]*\.ckpt", name)
            if path and (not fits or name == PREVIOUS or (own == prefix and name == LAST)):
                raise _forged(f"names {path!r} as one of the best checkpoints")
            return str(Path(str(self.dirpath)) / name) if path else ""

        best = state_dict.get("best_k_models") or {}
        if not isinstance(best, dict):
            raise _forged("has no list of the best checkpoints")
        scores = [*best.values(), *(state_dict.get(k) for k in ("best_model_score", "kth_value"))]
        if not all(score is None or isinstance(score, (int, float, Tensor)) for score in scores):
            raise _forged("holds a score that is not a number")
        moved = dict(state_dict, dirpath=self.dirpath)
        for key in ("best_model_path", "kth_best_model_path"):
            moved[key] = here(moved.get(key))
        if moved.get("last_model_path"):  # from save_last=true, not the file of LastCheckpoint
            moved["last_model_path"] = here(moved["last_model_path"], "last")
        moved["best_k_models"] = {here(path): score for path, score in best.items()}
        super().load_state_dict(moved)


def _forged(what: str) -> UserError:
    return UserError(
        f"the checkpoint {what}, which no run writes: it was changed, or is damaged. For a new run "
        "that starts from its weights: adapter=CHECKPOINT.ckpt."
    )


class SyncedCheckpointIO(TorchCheckpointIO):
    """A checkpoint writer that writes beside the final path, syncs, and then renames.

    Lightning's own writer uses the system's folder for temporary files, which may be small or on
    another disk. It syncs nothing.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        create_folder(Path(path).parent)
        with written_beside(Path(path)) as beside:
            save_to(beside, checkpoint)


def sync_checkpoints(trainer: L.Trainer) -> None:
    """Make a trainer sync its checkpoints to disk, unless it has a custom checkpoint writer."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SyncedCheckpointIO()


def save_to(path: Path, content: Any) -> None:
    """Save to memory, then to the file, because torch.save hides why a file cannot be written.

    Raises:
        OSError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())
