"""Merging of an adapter into its base model: `lora-lightning merge`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.adapters.save import save_tokenizer
from lora_lightning.config.schema import ModelConfig
from lora_lightning.config.untrusted import check_links
from lora_lightning.data.collators import PaddingCollator
from lora_lightning.lora import UserError, load_adapter
from lora_lightning.lora.initialization.loftq import copy_quantized_values
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.output_folders import check_replaceable, replaced_folder
from lora_lightning.utils.run_folder import check_not_in_run

from .loading import load_trained

PROBES = (
    "A short text.",
    "Nothing about this was worth the wait, and yet I would not have missed it.",
    "It arrived on Tuesday, two days early, in a box far too large for what was in it.",
    "no",
)


def merge(folder: str | Path, output: str | Path, *, model: dict[str, Any] | None = None) -> float:
    """Merge an adapter into its base model and write a plain Hugging Face folder.

    Returns:
        The largest logit difference between the adapter model and the merged model, over a few
        texts. The merged model is read back from disk for this.
    """
    check_links(Path(folder))
    check_not_in_run(Path(output))
    check_replaceable(Path(output), by="merge", sources=[folder])
    module = _unquantized(Path(folder), model or {})
    if module.adapter is None:
        raise UserError(
            f"adapter={folder}: is a fully fine-tuned model, so there is nothing to merge."
        )
    before = _probe(module)
    sources = (folder, module.model_config.name_or_path)
    with replaced_folder(Path(output), by="merge", sources=sources) as staging:
        merged = module.adapter.merge_and_unload()
        merged.save_pretrained(staging)  # type: ignore[operator]
        save_tokenizer(module.tokenizer, staging)
        dtype = str(next(merged.parameters()).dtype).removeprefix("torch.")
        config = ModelConfig(name_or_path=str(staging), dtype=dtype)
        gap = _gap(module, config, before)
    return gap


def quantization_gap(folder: Path, merged: Path, *, model: dict[str, Any]) -> float:
    """Return the largest logit difference between an adapter and its merged model.

    The adapter runs on its quantized base. The maximum is over a few texts.
    """
    module = load_trained(folder, model=model, device="cpu")
    return _gap(module, ModelConfig(name_or_path=str(merged)), _probe(module))


def _gap(module: LoraModule, config: ModelConfig, before: Tensor) -> float:
    """Replace a module's model by a merged one, and return the largest change of its logits."""
    module.adopt(module.task.build_model(config, module.tokenizer)[0].eval(), None)
    return (_probe(module) - before).abs().max().item()


def _unquantized(folder: Path, model: dict[str, Any]) -> LoraModule:
    """Return an adapter on its floating-point base, ready to merge.

    The base has its values from before quantization. An adapter that compensates for the
    quantization instead gets the values that remain after it.
    """
    if AdapterFolder(folder).compensated_quantization() is None:
        return load_trained(folder, model={**model, "quantization": None}, device="cpu")
    module = load_trained(folder, model=model, device="cpu")
    config = replace(module.model_config, quantization=None)
    base, _ = module.task.build_model(config, module.tokenizer)
    assert module.adapter is not None
    copy_quantized_values(base, module.adapter.remove())
    module.adopt(base, load_adapter(base, folder))
    return module.eval()


@torch.inference_mode()
def _probe(module: LoraModule) -> Tensor:
    encoded = module.tokenizer(list(PROBES))["input_ids"]
    batch = PaddingCollator(module.tokenizer.pad_token_id)([{"input_ids": ids} for ids in encoded])
    return module.task.logits(module.model, batch).float()
