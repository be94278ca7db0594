"""An adapter folder, by the names of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_lightning.config.untrusted import check_task_state, settings_from_file
from lora_lightning.lora import UserError
from lora_lightning.lora.serialization.checksums import SIDECAR, check_content, check_files
from lora_lightning.lora.serialization.peft_config import CONFIG_NAME
from lora_lightning.lora.serialization.save import WEIGHTS_NAME
from lora_lightning.utils.folder_swap import MARK
from lora_lightning.utils.terminal import command

CARD = "README.md"
"""Name of the model card."""


class AdapterFolder:
    """The folder of an adapter, or of a fully trained model, with the paths of its files.

    Args:
        path: The folder. It need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG_NAME
        """PEFT's settings."""
        self.weights = self.path / WEIGHTS_NAME
        """PEFT's tensors."""
        self.sidecar = self.path / SIDECAR
        """Task, labels, fingerprint of the base, settings and checksums of the run."""
        self.card = self.path / CARD
        """Model card."""
        self.tokenizer = self.path / "tokenizer.json"
        """Vocabulary and rules of a fast tokenizer."""
        self.tokenizer_config = self.path / "tokenizer_config.json"
        """Settings of a tokenizer of any kind."""

    def other_files(self) -> list[Path]:
        """Return the files that do not depend on the weights, such as the tokenizer's."""
        of_weights = {self.config, self.weights, self.card, self.path / MARK}
        return [path for path in self.path.iterdir() if path.is_file() and path not in of_weights]

    def size(self) -> int:
        """Return the total size of the files, in bytes."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def check_files(self) -> None:
        """Raise UserError if a file differs from its checksum in the sidecar."""
        check_files(self.path)

    def read_sidecar(self) -> dict[str, Any]:
        """Return the content of the sidecar.

        Raises:
            UserError: The folder or the sidecar is absent or broken.
        """
        folder, path = self.path, self.sidecar
        if folder.is_file() and folder.suffix == ".ckpt":
            raise UserError(
                f"adapter={folder}: is a checkpoint of a run. Make an adapter of it: "
                f"{command('import', source=folder, output='DIR')}"
            )
        if not folder.is_dir():
            raise UserError(
                f"adapter={folder}: folder not found. A run saves its adapter in <run>/adapter."
            )
        if not path.is_file():
            inside = folder / "adapter" / SIDECAR
            hint = f" Did you mean adapter={inside.parent}?" if inside.is_file() else ""
            raise UserError(
                f"adapter={folder}: holds no {SIDECAR}, so lora-lightning did not make it.{hint} "
                "A PEFT adapter of another tool loads in Python: lora_lightning.load_adapter."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            groups = [content["settings"][group] for group in ("model", "task", "lora", "data")]
            if not all(isinstance(part, dict) for part in (*groups, content["task_state"])):
                raise TypeError("settings and task_state must be objects")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(error) from None
        check_content(content, path)
        check_task_state(content["task_state"], path)
        return {**content, "settings": settings_from_file(content["settings"], path)}

    def damaged(self, error: Exception) -> UserError:
        """Return the error for a damaged sidecar."""
        return UserError(f"{self.sidecar} is damaged: {error!r}. Copy the adapter again.")

    def compensated_quantization(self) -> str | None:
        """Return the quantization whose error the adapter corrects (LoftQ), or None."""
        if not self.sidecar.is_file():
            return None
        settings = self.read_sidecar()["settings"]
        kind = settings["model"].get("quantization")
        return str(kind) if settings["lora"].get("init") == "loftq" else None

    def check_quantization(self, *, on: str | None = None) -> None:
        """Raise UserError if the adapter corrects a quantization that its base will not have.

        Args:
            on: Quantization of the base that the adapter is used on. Defaults to None.
        """
        kind = self.compensated_quantization()
        if kind != on and kind is not None:
            raise UserError(
                f"adapter={self.path}: requires model.quantization={kind}, whose error it corrects "
                "(lora.init=loftq). Keep that setting, or merge it: "
                f"{command('merge', adapter=self.path, output='DIR')}."
            )
