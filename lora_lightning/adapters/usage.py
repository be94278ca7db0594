"""Python code and notes on the use of an adapter, for its model card."""

from __future__ import annotations

from typing import Any

from lora_lightning.config.groups import Settings
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.utils.terminal import one_line

from .save import Trained

CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""Classes of transformers by PEFT task type."""


def usage(settings: Settings, module: Trained) -> dict[str, Any]:
    """Return the code and the notes on the use of an adapter or a model."""
    kind, base = CLASSES.get(module.task.peft_task_type), settings.model.name_or_path
    labels = module.task.state().get("labels")
    tokens, rows = module.model_config.new_tokens, vocabulary_rows(module.model)
    grow = f"base.resize_token_embeddings({rows})"
    code: list[str] = []
    if settings.lora is not None and kind is not None and "://" not in base:
        arguments = [f'"{base}"']
        arguments += [f"num_labels={len(labels)}"] if labels else []
        if settings.model.revision:
            arguments.append(f'revision="{settings.model.revision}"')
        imports, quantized = kind, []
        if settings.lora.init == "loftq":  # corrects this quantization
            config: Any = module.model.config
            options = config.quantization_config.to_diff_dict()
            given = {key: value for key, value in options.items() if not key.startswith("_")}
            imports = f"{kind}, BitsAndBytesConfig"
            quantized = [f"quantized = BitsAndBytesConfig(**{given!r})"]
            arguments.append("quantization_config=quantized")
        code = [
            "from peft import PeftModel",
            f"from transformers import {imports}",
            "",
            *quantized,
            f"base = {kind}.from_pretrained({', '.join(arguments)})",
            *([grow] if tokens else []),
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ]
    notes = []
    if tokens:
        names = ", ".join(f"`{token}`" for token in tokens)
        notes.append(f"New tokens: {names}. PEFT requires `{grow}` before it loads the adapter.")
    if settings.lora is not None and settings.model.quantization:
        fits = (
            "and fits no other base (`lora-lightning merge` makes a whole model of it)"
            if settings.lora.init == "loftq"
            else "and fits it in any precision"
        )
        notes.append(f"Trained on its base in {settings.model.quantization}, {fits}.")
    if labels:
        notes.append(f"Labels, in order: {', '.join(map(one_line, labels))}.")
    return {"predict": True, "code": code, "notes": notes}
