"""Loading of a trained adapter or model, with its task, from the folder of a run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.adapters.save import base_fingerprint
from lora_lightning.config.compose import settings_saved
from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora import UserError, load_adapter
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import build_task
from lora_lightning.training.module import LoraModule


def load_trained(
    folder: str | Path,
    *,
    model: dict[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> LoraModule:
    """Return a LoraModule in eval mode, with the adapter of a run in `folder`.

    Args:
        folder: Adapter folder of a run.
        model: Changes to how the base model is loaded, such as {"dtype": "bfloat16"}, or
            {"name_or_path": "..."} if the base model has moved. Defaults to None.
        device: Target device. Defaults to None, a GPU if there is one.

    Raises:
        UserError: The folder is damaged, or the base model differs from the one used in training.
    """
    files = AdapterFolder(folder)
    sidecar = files.read_sidecar()
    settings = settings_saved(sidecar["settings"])
    task = build_task(settings.task)
    try:
        task.restore(sidecar["task_state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise files.damaged(error) from None
    config = ModelConfig(**{**asdict(settings.model), **(model or {})})
    if settings.lora is None:
        files.check_files()  # an adapter's files are checked when it is loaded
        config.name_or_path = str(folder)
    files.check_quantization(on=config.quantization)
    if config.new_tokens != settings.model.new_tokens:
        raise UserError(
            f"model.new_tokens={config.new_tokens}: the tokens of adapter={folder} are fixed. "
            "Leave it out."
        )
    # The saved tokenizer has the new tokens.
    tokenizer = load_tokenizer(replace(config, tokenizer=str(folder), new_tokens=[]))
    module = LoraModule(task, config, settings.lora, tokenizer=tokenizer)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with device:  # load weights directly to the device
        base, _ = task.build_model(config, tokenizer)
    module.adopt(base, None if settings.lora is None else load_adapter(base, folder))
    _check_base(module, sidecar.get("base_fingerprint", ""), folder)
    return module.to(device).eval()


def _check_base(module: LoraModule, recorded: str, folder: str | Path) -> None:
    dtypes = {parameter.dtype for parameter in module.model.parameters()}
    if not recorded or not dtypes <= {torch.float32, torch.bfloat16}:
        return
    if base_fingerprint(module) != recorded:
        raise UserError(
            f"model.name_or_path={module.model_config.name_or_path}: adapter {folder} was trained "
            "on another base model, with the same shapes and other weights. Name that one: "
            "model.name_or_path=NAME."
        )
