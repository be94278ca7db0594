"""The model card, README.md in an adapter folder: contents and training of the adapter."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_lightning.config.groups import Settings
from lora_lightning.config.saved import read_overrides
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.errors import UserError
from lora_lightning.lora.embeddings import vocabulary_rows
from lora_lightning.lora.serialization.peft_config import CONFIG_NAME
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.terminal import fenced, one_line, printable

from .folder import Trained, versions

CARD = "README.md"
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
PIPELINES = {"SEQ_CLS": "text-classification"}
SPLITS = (("train", "training"), ("val", "validation"), ("test", "test"))


def write_card(
    folder: Path,
    run_dir: Path,
    settings: Settings,
    module: Trained,
    data: LoraDataModule,
    result: dict[str, Any],
) -> None:
    """Write the card of a trained adapter or model.

    Args:
        folder: folder of the adapter, or of the whole model.
        run_dir: folder of the run, which holds its command.
        settings: settings of the run.
        module: trained module.
        data: data that it was trained on.
        result: numbers of the run.
    """
    parts = [
        _front_matter(settings, module),
        _title(settings),
        _use(settings, module),
        _data(settings, data),
        _results(result),
        _making(settings, result, run_dir, _stored_as(folder)),
    ]
    atomic_write(folder / CARD, printable("\n\n".join(parts)) + "\n")


def _front_matter(settings: Settings, module: Trained) -> str:
    """Return the metadata that the hub reads.

    A base that is not a hub name is left out, because the hub would refuse it.
    """
    lines = ["---"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", settings.model.name_or_path):
        lines.append(f"base_model: {settings.model.name_or_path}")
    if settings.data.path:
        lines += ["datasets:", f"- {settings.data.path}"]
    if settings.lora is not None:
        lines.append("library_name: peft")
    lines.append(f"pipeline_tag: {PIPELINES.get(module.task.peft_task_type, 'text-generation')}")
    lines += ["tags:", *([] if settings.lora is None else ["- lora"]), "- lora_lightning", "---"]
    return "\n".join(lines)


def _title(settings: Settings) -> str:
    task, base = settings.task["name"], settings.model.name_or_path
    if settings.lora is None:
        return f"# {task}: {base}, fine-tuned whole"
    return f"# {task}: a LoRA adapter of {base}"


def _use(settings: Settings, module: Trained) -> str:
    predict = 'lora-lightning predict adapter=THIS_FOLDER text="..."'
    lines = ["## Use", "", "```bash", predict, "```"]
    kind, base = CLASSES.get(module.task.peft_task_type), settings.model.name_or_path
    labels = module.task.state().get("labels")
    tokens, rows = module.model_config.new_tokens, vocabulary_rows(module.model)
    if settings.lora is not None and kind is not None and "://" not in base:
        more = f", num_labels={len(labels)}" if labels else ""
        more += f', revision="{settings.model.revision}"' if settings.model.revision else ""
        classes, quantised = kind, ""
        if settings.lora.init == "loftq":  # compensates for this quantization
            classes, more = f"{kind}, BitsAndBytesConfig", f"{more}, quantization_config=quantized"
            base_config: Any = module.model.config
            options = base_config.quantization_config.to_diff_dict()
            given = {key: value for key, value in options.items() if not key.startswith("_")}
            quantised = f"quantized = BitsAndBytesConfig(**{given!r})"
        lines += ["", "```python", "from peft import PeftModel"]
        lines += [f"from transformers import {classes}", "", *([quantised] if quantised else [])]
        lines += [f'base = {kind}.from_pretrained("{base}"{more})']
        if tokens:
            lines.append(f"base.resize_token_embeddings({rows})")
        lines += ['model = PeftModel.from_pretrained(base, "THIS_FOLDER")', "```"]
    if tokens:
        named = ", ".join(f"`{token}`" for token in tokens)
        grow = f"`base.resize_token_embeddings({rows})`"
        lines += ["", f"New tokens: {named}. PEFT wants {grow} before it loads the adapter."]
    if settings.lora is not None and settings.model.quantization:
        belongs = (
            "and goes on no other (`lora-lightning merge` makes a model of it that does)"
            if settings.lora.init == "loftq"
            else "and goes on it in any precision"
        )
        lines += ["", f"Trained on its base in {settings.model.quantization}, {belongs}."]
    if labels:
        lines += ["", f"Labels, in order: {', '.join(map(one_line, labels))}."]
    return "\n".join(lines)


def _data(settings: Settings, data: LoraDataModule) -> str:
    counts = [f"{len(data.encoded[key]):,} {name}" for key, name in SPLITS if data.has(key)]
    named = {
        key: Path(str(value)).name
        for key in ("train", "val", "test")
        if (value := getattr(settings.data, key))
    }
    source = (
        settings.data.path
        or ", ".join(map(one_line, dict.fromkeys(named.values())))
        or "the package's own"
    )
    return f"## Data\n\n{source}: {', '.join(counts)} rows."


def _results(result: dict[str, Any]) -> str:
    """Return a table of the final metrics, with the values before training if measured."""
    before = result.get("before") or {}
    names = sorted(name for name in result if name.startswith(("val/", "test/")))
    lines = ["## Results", "", "| metric | before training | after |", "|---|---|---|"]
    for name in names:
        was = f"{before[name]:.4f}" if name in before else ""
        lines.append(f"| {name} | {was} | {result[name]:.4f} |")
    baseline = result.get("baseline") or {}
    for name in sorted(baseline):
        if name != "name":
            lines.append(f"| {name}, {baseline['name']} | | {baseline[name]:.4f} |")
    return "\n".join(lines)


def _stored_as(folder: Path) -> str:
    """Return the rank and alpha stored in a PEFT folder; empty for a whole model."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return ""
    config = json.loads(path.read_text(encoding="utf-8"))
    return f"rank {config['r']}, alpha {config['lora_alpha']}"


def _making(settings: Settings, result: dict[str, Any], run_dir: Path, stored: str) -> str:
    share = 100 * result["trainable_parameters"] / result["total_parameters"]
    lines = ["## How it was made", ""]
    if (overrides := run_dir / ".hydra" / "overrides.yaml").is_file():
        with suppress(UserError):  # if damaged, the card omits the command
            # Unresolved: a shared card must not show values of environment variables.
            typed = read_overrides(overrides)
            told = [x for x in typed if not x.lstrip("+").startswith(("output_dir=", "hydra"))]
            lines += [*fenced(shlex.join(["lora-lightning", "train", *told])), ""]
    values = {"learning rate": settings.optim.lr, "optimizer": settings.optim.name}
    lora = settings.lora
    if lora is not None:
        values = {
            "rank": lora.rank,
            "alpha": lora.alpha_of(""),
            "scaling": lora.scaling_of(""),
            "targets": lora.targets,
            "first values": lora.init,
            "stored as": stored,
            "DoRA": lora.use_dora,
            "dropout": lora.dropout,
            **values,
        }
    values |= {
        "steps": result["steps"],
        "trained parameters": f"{result['trainable_parameters']:,} ({share:.2f} %)",
        "seconds": round(result["seconds"]),
        "peak memory, MiB": round(result["peak_memory_mib"]),
        "seed": result["seed"],
    }
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items()), ""]
    lines.append(", ".join(f"{name} {number}" for name, number in versions().items()) + ".")
    return "\n".join(lines)
