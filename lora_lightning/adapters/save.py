"""Writing of trained weights as an adapter folder, or as a whole model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora import Adapter, save_adapter
from lora_lightning.lora.embeddings import before_growth
from lora_lightning.lora.serialization.checksums import write_checksums
from lora_lightning.lora.serialization.validation import check_trained
from lora_lightning.models.fingerprint import fingerprint
from lora_lightning.tasks import Task
from lora_lightning.utils.output_folders import check_replaceable, replaced_folder
from lora_lightning.utils.versions import versions

from .folder import AdapterFolder


class Trained(Protocol):
    """Module that a folder is written from: `LoraModule`, or a module with the same attributes."""

    adapter: Adapter | None
    tokenizer: Any
    task: Task
    model_config: ModelConfig

    @property
    def model(self) -> nn.Module:
        """The model, with the adapter on it."""
        ...

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are trained and stored, by name."""
        ...


def save_trained(
    module: Trained,
    folder: Path,
    settings: dict[str, Any],
    *,
    base: str,
    by: str = "train",
    sources: Iterable[str | Path] = (),
    later: Iterable[str] = (),
) -> None:
    """Write the trained weights of a run, with the tokenizer and the settings to use them.

    A LoRA run gives a PEFT folder. Full fine-tuning gives a plain Hugging Face folder.

    Args:
        module: Trained module.
        folder: Folder to write.
        settings: Settings of the run.
        base: `base_fingerprint` of the module.
        by: Command that writes. Defaults to "train".
        sources: Files and folders that the module was read from. Defaults to none.
        later: Names of files that are written into the folder afterwards. Defaults to none.

    Raises:
        UserError: The weights are not finite, or the folder cannot be written.
    """
    check_replaceable(folder, by=by, sources=sources)
    content = {
        "format": 1,
        "task_state": module.task.state(),
        "base_fingerprint": base,
        "settings": settings,
        "versions": versions(),
    }

    def add_files(staging: Path) -> None:
        save_tokenizer(module.tokenizer, staging)
        write_checksums(staging, content)

    check_trained(module.trainable_tensors(), hint=f"{folder} was not written.")
    if module.adapter is not None:
        save_adapter(
            module.adapter,
            folder,
            base_model=module.model_config.name_or_path,
            revision=module.model_config.revision,
            task_type=module.task.peft_task_type,
            also=add_files,
            by=by,
            later=later,
        )
        return
    with replaced_folder(folder, by=by, sources=sources, later=later) as staging:
        module.model.save_pretrained(staging)  # type: ignore[operator]
        add_files(staging)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, with compact JSON, which is a third smaller.

    The truncation and padding of the last text are left out, because transformers sets them with
    each text. They also depend on whether this process tokenized the rows or read them from the
    cache.
    """
    tokenizer.save_pretrained(folder)
    path = AdapterFolder(folder).tokenizer
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {"truncation": None, "padding": None}
        path.write_text(
            json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
        )


def base_fingerprint(module: Trained) -> str:
    """Return a fingerprint that distinguishes the frozen base from others of the same shape.

    Rows that the base has grown by do not change it. It is "" if all parameters are trained, or if
    the base is quantized, which changes its weights.
    """
    if module.adapter is None or module.model_config.quantization is not None:
        return ""
    trained = {id(tensor) for tensor in module.trainable_tensors().values()}
    shorter = before_growth(module.model)
    return fingerprint(
        (name.replace(".base_layer.", "."), shorter.get(parameter, parameter))
        for name, parameter in module.model.named_parameters()
        if id(parameter) not in trained
    )
