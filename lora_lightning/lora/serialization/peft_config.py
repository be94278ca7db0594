"""Content of adapter_config.json for an adapter in place, as PEFT reads it."""

from __future__ import annotations

import math
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.lora.layers.linear import LoraConv1D, LoraLayer
from lora_lightning.lora.layers.parameter import LoraParameter
from lora_lightning.lora.model import Adapter
from lora_lightning.lora.moe import named_like_experts
from lora_lightning.lora.name_patterns import (
    ends_with,
    exact_pattern,
    exact_targets,
    shortest_suffix,
)


def to_peft_config(
    adapter: Adapter,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """Return the content of adapter_config.json for an adapter in place.

    Targets are the shortest name suffixes that match exactly the adapted modules. Every engine then
    adapts the same weights, whatever regex or shorthand chose them.
    """
    config, layers = adapter.config, adapter.layers
    modules, parameters = _modules_and_parameters(adapter)
    names = modules | parameters  # PEFT looks up the patterns by these names
    ranks = {names[key]: layer.stored_rank for key, layer in layers.items()}
    alphas = {names[key]: _stored_alpha(adapter, key) for key in layers}
    rank, rank_pattern = _common(ranks, config.exported().rank)
    alpha, alpha_pattern = _common(alphas, config.exported().default_alpha(rank))
    return {
        "alpha_pattern": {name: _plain(value) for name, value in alpha_pattern.items()},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(isinstance(layer, LoraConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has no dropout on parameters
        "modules_to_save": sorted(adapter.saved_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": revision,
        "target_modules": _module_suffixes(adapter, set(modules)),
        "target_parameters": _parameter_suffixes(adapter, set(parameters.values())) or None,
        "task_type": task_type,
        "trainable_token_indices": _token_indices(adapter),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def _modules_and_parameters(adapter: Adapter) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names of layers for PEFT: names of modules, and names of parameters."""
    plain = adapter.config.bias == "none" and not adapter.config.use_dora  # parameters take neither
    by_weight = set(named_like_experts(adapter.model, adapter.layers)) if plain else set()
    modules, parameters = {}, {}
    for name, layer in adapter.layers.items():
        if isinstance(layer, LoraParameter):
            parameters[name] = name
        elif name in by_weight:
            parameters[name] = f"{name}.weight"
        else:
            modules[name] = name
    return modules, parameters


def _stored_alpha(adapter: Adapter, name: str) -> float:
    """Return the alpha that keeps the layer's scaling at the stored rank."""
    layer: LoraLayer = adapter.layers[name]
    ratio = layer.stored_rank / layer.rank
    return adapter.alphas[name] * (math.sqrt(ratio) if adapter.config.use_rslora else ratio)


def _module_suffixes(adapter: Adapter, modules: set[str]) -> list[str] | str:
    """Return name suffixes of the modules.

    If suffixes also match other modules, return one regex for whole names.
    """
    inside = tuple(f"{name}." for name in modules)
    others = [
        name
        for name, _ in adapter.model.named_modules()
        if name and name not in modules and not name.startswith(inside)
    ]
    suffixes = sorted({shortest_suffix(name, others) for name in modules})
    if any(ends_with(other, suffix) for suffix in suffixes for other in others):
        return exact_targets(modules)
    return suffixes


def _parameter_suffixes(adapter: Adapter, parameters: set[str]) -> list[str]:
    every = {name.replace(".base_layer", "") for name, _ in adapter.model.named_parameters()}
    others = every - parameters
    suffixes = sorted({shortest_suffix(name, others, minimum=2) for name in parameters})
    for suffix in suffixes:
        if taken := next((other for other in others if ends_with(other, suffix)), None):
            module = taken.rpartition(".")[0]
            raise UserError(
                f"lora.targets: {suffix} cannot be stored without {taken}, whose name ends in it: "
                f"PEFT adapts both. Adapt {module} too, or leave both out."
            )
    return suffixes


def _token_indices(adapter: Adapter) -> dict[str, list[int]] | None:
    """Return the tokens with trainable rows, by the shortest suffix that names only their layer.

    Tied layers share the entry.
    """
    names = [name for name, _ in adapter.model.named_modules() if name]
    found = {}
    for rows in adapter.rows:
        others = [name for name in names if name != rows.name]
        found[shortest_suffix(rows.name, others)] = rows.indices
    return found or None


def _common(values: dict[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """Return one value for all modules, and patterns for the modules that differ from it."""
    common = default if default in values.values() else next(iter(values.values()))
    patterns: dict[str, Any] = {}
    for name, value in values.items():
        if value != common:
            others = [other for other, theirs in values.items() if theirs != value]
            patterns[exact_pattern(shortest_suffix(name, others), name, others)] = value
    return common, dict(sorted(patterns.items()))


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
