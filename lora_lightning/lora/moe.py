"""Experts in one tensor, as in transformers 5, and layers that PEFT mistakes for experts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lora_lightning.errors import UserError

from .config import LoraConfig
from .layers.lora_layer import LoraLayer

MISTAKEN_IN = frozenset(
    [
        "Dots3NoteTextModel",
        "UnlimitedOcrTextModel",
        "afmoe",
        "beam",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "longcat_flash",
        "mellum",
        "olmoe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "solar_open",
    ]
)
"""Model types in which PEFT 0.21 mistakes layers for experts by their names.

transformers 5.23 converts checkpoints of these types like Qwen2-MoE checkpoints. Qwen2-MoE itself
is not included.
"""


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights of several experts in one tensor, (E, ., .), by name in the bare model."""
    return {
        f"{path}.{leaf}".replace(".base_layer", ""): parameter
        for path, module in model.named_modules()
        if not isinstance(module, (LoraLayer, _ConvNd))
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] > 1 and parameter.is_floating_point()
    }


def named_like_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return dense and shared layers with former expert names, in a model with experts.

    PEFT may mistake these layers for experts. It always finds them by the names of their weights.
    """
    old = ("gate_proj", "up_proj", "down_proj")
    named = [name for name in names if name.rpartition(".")[2] in old]
    return named if named and expert_parameters(model) else []


def check_mistaken_experts(model: nn.Module, config: LoraConfig, names: Iterable[str]) -> None:
    """Raise UserError for settings that PEFT lacks on the layers that it mistakes for experts.

    Args:
        model: the bare model.
        config: the adapter's settings.
        names: names of the layers that the adapter wraps.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    setting = f"bias={config.bias}" if config.bias != "none" else ""
    setting = "use_dora=true" if config.use_dora else setting
    mistaken = setting and kind in MISTAKEN_IN and named_like_experts(model, names)
    if mistaken:
        last = sorted({name.rpartition(".")[2] for name in mistaken})
        raise UserError(
            f"lora.{setting}: not supported on {', '.join(last)} of {kind}, since PEFT takes "
            f"them for experts. Remove it, or set lora.exclude=[{','.join(last)}]."
        )
