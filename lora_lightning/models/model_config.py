"""The transformers config of a base model: reading, checks and limits."""

from __future__ import annotations

from typing import Any

from lora_lightning.config.schema import ModelConfig
from lora_lightning.config.untrusted import EXPERTS, is_installed_attention
from lora_lightning.errors import UserError

from .private_api import attention_of, experts_of, set_kernels
from .resolve import reported_failure, resolve


def load_model_config(config: ModelConfig) -> Any:
    """Load the base model's transformers config, without its weights."""
    return config_and_kernels(config)[0]


def config_and_kernels(config: ModelConfig) -> tuple[Any, bool]:
    """Load the config, and return whether kernels that its file names were removed from it."""
    from transformers import AutoConfig

    with reported_failure(config.name_or_path, "config"):
        source = resolve(config.name_or_path)
        _check_no_adapter(source, config.revision)
        loaded = AutoConfig.from_pretrained(
            source,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    removed = _names_foreign_kernels(loaded)
    if removed:
        set_kernels(loaded, attention=config.attn_implementation)
    return loaded, removed


def _check_no_adapter(source: str, revision: str | None) -> None:
    """Raise UserError for a base folder with an adapter, which transformers loads onto the base."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source, revision=revision) is not None:
        raise UserError(
            f"model.name_or_path={source}: holds an adapter, which would become part of the frozen "
            "base. Merge it first, remove adapter_config.json, or train that adapter: adapter=DIR."
        )


def _names_foreign_kernels(model_config: Any) -> bool:
    """Return whether the config names attention or experts that transformers fetches as code."""
    attention = attention_of(model_config)
    if attention is not None and not is_installed_attention(attention):
        return True
    if experts_of(model_config) not in (None, *EXPERTS):
        return True
    parts = [getattr(model_config, name, None) for name in getattr(model_config, "sub_configs", ())]
    return any(map(_names_foreign_kernels, filter(None, parts)))


def class_names(model_config: Any) -> list[str] | None:
    """Return the class names of a base that is already a classifier, in the order of head rows.

    Args:
        model_config: Transformers config of the base.

    Returns:
        The class names, which are LABEL_0, LABEL_1 ... if unnamed. None if the base has no
        classification head.
    """
    kinds = getattr(model_config, "architectures", None) or []
    names = getattr(model_config, "id2label", None)
    if not isinstance(names, dict) or not any("SequenceClassification" in k for k in kinds):
        return None
    return [str(names[number]) for number in sorted(names)]


def max_positions(model_config: Any) -> int | None:
    """Return the longest input that the position embeddings allow, or None if unlimited."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    value = getattr(text or model_config, "max_position_embeddings", None)
    if not isinstance(value, int) or value <= 0:
        return None
    # RoBERTa and related models count positions from pad_token_id + 1.
    offset = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
    if getattr(model_config, "model_type", "") in offset:
        return value - (getattr(model_config, "pad_token_id", 1) or 1) - 1
    return value
