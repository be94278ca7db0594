"""Quantized bases: frozen weights in 4 or 8 bits, through transformers and bitsandbytes.

This is QLoRA (Dettmers et al. 2023, arXiv:2305.14314). The base's linear layers hold NF4 or int8,
are dequantized for each matmul, and get no gradient. Their adapter is ordinary LoRA.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora import UserError
from lora_lightning.lora.module_index import head_modules

KEY = "quantization_config"
FULL_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "BOOL")
"""Dtypes of tensors in an unquantized base."""


def quantization_options(
    auto_class: Any, model_config: Any, config: ModelConfig, **settings: Any
) -> dict[str, Any]:
    """Return the from_pretrained arguments for a quantized base, empty without quantization.

    The heads are not quantized, because they are trained whole or compute the logits.

    Args:
        auto_class: The transformers class that loads the model.
        model_config: Config of the base.
        config: This package's model settings.
        settings: Further settings of the model's config, such as num_labels.

    Raises:
        UserError: If bitsandbytes is not installed.
    """
    if config.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={config.quantization}: requires bitsandbytes. "
            'pip install "lora_lightning[quant]"'
        )
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        bare = auto_class.from_config(model_config, trust_remote_code=config.trust_remote_code)
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    four = config.quantization == "nf4"
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[name.rpartition(".")[2] for name in head_modules(bare)],
        )
    }


def check_weights_quantized(name: str, model_config: Any, *, revision: str | None) -> None:
    """Raise UserError for a base with unquantized weights whose config asks for quantized layers.

    transformers quantizes such a base silently. A base that was saved quantized passes.

    Args:
        name: Hub name or folder.
        model_config: Config of the base.
        revision: Revision on the hub.

    Raises:
        UserError: If the config asks for quantized layers but the weights are not quantized.
    """
    text = model_config.get_text_config(decoder=True)
    options = getattr(model_config, KEY, None) or getattr(text, KEY, None)
    files = _weight_files(name, revision) if options else []
    if files and not any(map(_is_quantized, files)):
        method = options.get("quant_method", "?") if isinstance(options, dict) else "?"
        raise UserError(
            f"model.name_or_path={name}: config.json asks for quantized layers ({method}), but the "
            f"weights are not quantized. Remove {KEY}, and quantize with model.quantization=nf4."
        )


def _weight_files(name: str, revision: str | None) -> list[str]:
    """Return a base's safetensors files, downloaded from the hub if they are not local."""
    from transformers.utils.hub import cached_file

    def find(file: str) -> str | None:
        try:
            return cached_file(name, file, revision=revision)
        except OSError:
            return None

    index = find("model.safetensors.index.json")
    names = ["model.safetensors"]
    if index is not None:
        content = json.loads(Path(index).read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    return [path for path in map(find, names) if path is not None]


def _is_quantized(path: str) -> bool:
    with safe_open(path, "pt") as file:
        return any(file.get_slice(name).get_dtype() not in FULL_DTYPES for name in file.keys())  # noqa: SIM118


def note_on_experts(model: nn.Module) -> str:
    """Return a note on expert weights that bitsandbytes leaves unquantized, or "" without experts.

    bitsandbytes quantizes linear layers, but transformers keeps a layer's experts in one tensor.
    """
    kinds = {
        str(parameter.dtype).removeprefix("torch.")
        for module in model.modules()
        if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point() and not parameter.requires_grad
    }
    if not kinds:
        return ""
    return (
        f"NOTE only linear layers are quantized. The weights of experts stay "
        f"{', '.join(sorted(kinds))}, see their memory with: lora-lightning check\n"
    )


def train_in_one_format(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights in evaluation.

    On CPUs with bf16 matmuls, bitsandbytes repacks the weights in the first pass without gradients.
    It has no backward pass for the new format, so a validation breaks later training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
