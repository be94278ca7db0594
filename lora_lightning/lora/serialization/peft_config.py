"""PEFT's adapter_config.json: written for an adapter in place, and read as a LoraConfig."""

from __future__ import annotations

import math
import re
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.lora.config import LoraConfig
from lora_lightning.lora.layers.linear import LoraConv1D
from lora_lightning.lora.layers.lora_layer import LoraLayer
from lora_lightning.lora.layers.parameter import LoraParameter
from lora_lightning.lora.model import Adapter
from lora_lightning.lora.moe import named_like_experts
from lora_lightning.lora.name_patterns import (
    ALL_LINEAR,
    ends_with,
    exact_pattern,
    exact_targets,
    shortest_suffix,
)

CONFIG_NAME = "adapter_config.json"

# PEFT settings that change what an adapter computes and that are not implemented here. A file that
# uses one raises an error, because ignoring it would silently change the outputs.
_UNSUPPORTED = (
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "megatron_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Settings of PEFT 0.21 and earlier that are read here or do not change a trained adapter.
_KNOWN = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "merge_weights"),
)
# These initializations also change the base weights, and a loader would have to repeat that.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OTHER_INITS = ("gaussian", "eva", "orthogonal", "mica")


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
                f"lora.targets: {suffix} cannot be stored without {taken}, since PEFT would adapt "
                f"both. Add {module} to lora.targets, or exclude both."
            )
    return suffixes


def _token_indices(adapter: Adapter) -> dict[str, list[int]] | None:
    """Return the tokens with trainable rows, by the shortest suffix that names only their layer.

    Tied layers share the entry.
    """
    names = [name for name, _ in adapter.model.named_modules() if name]
    by_suffix = {}
    for rows in adapter.rows:
        others = [name for name in names if name != rows.name]
        by_suffix[shortest_suffix(rows.name, others)] = rows.indices
    return by_suffix or None


def _common(values: dict[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """Return one value for all modules, and patterns for the modules that differ from it."""
    common = default if default in values.values() else next(iter(values.values()))
    patterns: dict[str, Any] = {}
    for name, value in values.items():
        if value != common:
            others = [other for other, its_value in values.items() if its_value != value]
            patterns[exact_pattern(shortest_suffix(name, others), name, others)] = value
    return common, dict(sorted(patterns.items()))


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def from_peft_config(raw: dict[str, Any]) -> LoraConfig:
    """Return the settings that an adapter_config.json describes.

    Raises:
        UserError: the file asks for something that is not implemented here. The message names it.
    """
    _check_supported(raw)
    try:
        return LoraConfig(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            targets=_targets(raw.get("target_modules")),
            target_parameters=_listed(raw.get("target_parameters") or None),
            exclude=raw.get("exclude_modules") or [],
            layers=_listed(raw.get("layers_to_transform")) or None,
            layers_pattern=raw.get("layers_pattern") or None,
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            use_rslora=_switch(raw, "use_rslora"),
            use_dora=_switch(raw, "use_dora"),
            bias=raw.get("bias", "none"),
            modules_to_save=_listed(raw.get("modules_to_save") or None),
            trainable_token_indices=raw.get("trainable_token_indices") or None,
        )
    except (TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{CONFIG_NAME}: a value has the wrong type: {error}.") from None


def ties_updates(raw: dict[str, Any]) -> bool:
    """Return whether an adapter_config.json asks for one update of tied layers."""
    return _switch(raw, "ensure_weight_tying")


def _check_supported(raw: dict[str, Any]) -> None:
    """Raise UserError for settings without which the adapter might give other outputs."""
    for key, value in raw.items():
        if value and key in _UNSUPPORTED:
            raise _invalid(raw, key, "is not supported, and changes the outputs.")
        if value and key not in _KNOWN:
            raise _invalid(
                raw, key, "is unknown, and may change the outputs. If it does not, remove the line."
            )
    # PEFT before 0.19.1 swaps in and out of experts. Square ones would load.
    version = re.findall(r"\d+", str(raw.get("peft_version") or ""))[:3]
    if raw.get("target_parameters") and version and [int(part) for part in version] < [0, 19, 1]:
        raise UserError(
            f"{CONFIG_NAME}: target_parameters of PEFT {raw['peft_version']} have another layout. "
            "Merge the adapter with that version of PEFT."
        )
    init = str(raw.get("init_lora_weights", True)).lower()
    if init.startswith(_MUTATING_INITS):
        raise _invalid(
            raw,
            "init_lora_weights",
            "makes the adapter relative to a changed base. Convert it to plain LoRA with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    if isinstance(raw.get("init_lora_weights"), str) and init not in _OTHER_INITS:
        raise _invalid(
            raw,
            "init_lora_weights",
            "is unknown, and the adapter may be relative to a changed base. If not, set true.",
        )
    if raw.get("target_modules") is None and not raw.get("target_parameters"):
        raise UserError(f"{CONFIG_NAME}: target_modules not found.")


def _invalid(raw: dict[str, Any], key: str, problem: str) -> UserError:
    return UserError(f"{CONFIG_NAME}: {key}={raw[key]!r} {problem}")


def _switch(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):  # the string "false" would count as true
        raise _invalid(raw, key, "must be true or false.")
    return bool(value)


def _listed(value: Any) -> list[Any]:
    """Return a list of values. A single name or number becomes a list."""
    if value is None:
        return []
    return [value] if isinstance(value, (str, int)) else list(value)


def _targets(value: Any) -> Any:
    """Return the targets of a file, in which any string except all-linear is a regex."""
    if not isinstance(value, str) or value.lower() == ALL_LINEAR:
        return value
    return f"(?:{value})"
