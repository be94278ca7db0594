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
from lora_lightning.lora.config import LoraConfig
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.terminal import fenced, one_line, printable
from lora_lightning.utils.versions import versions

from .folder import AdapterFolder
from .save import Trained
from .usage import usage

PIPELINES = {"SEQ_CLS": "text-classification"}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{% if predict or code or notes -%}
## Use
{% endif %}
{%- if predict %}
```bash
lora-lightning predict adapter=THIS_FOLDER text="..."
```
{% endif %}
{%- if code %}
```python
{{ code | join("\n") }}
```
{% endif %}
{%- for note in notes %}
{{ note }}
{% endfor %}
{%- if data %}
## Data

{{ data }}
{% endif %}
{%- if results %}
## Results

| metric | before training | after |
|---|---|---|
{% for name, before, after in results -%}
| {{ name }} | {{ before }} | {{ after }} |
{% endfor %}
{%- endif %}
## How it was made
{% if command %}
{{ command }}
{% endif %}
| | |
|---|---|
{% for key, value in values.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{{ versions }}.
"""


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
        folder: Folder of the adapter, or of the whole model.
        run_dir: Folder of the run, which holds its command.
        settings: Settings of the run.
        module: Trained module.
        data: Data that it was trained on.
        result: Numbers of the run.
    """
    share = 100 * result["trainable_parameters"] / result["total_parameters"]
    values = {} if settings.lora is None else _lora_values(settings.lora, folder)
    values |= {
        "learning rate": settings.optim.lr,
        "optimizer": settings.optim.name,
        "steps": result["steps"],
        "trained parameters": f"{result['trainable_parameters']:,} ({share:.2f} %)",
        "seconds": round(result["seconds"]),
        "peak memory, MiB": round(result["peak_memory_mib"]),
        "seed": result["seed"],
    }
    source = _source(settings)
    counts = [f"{len(data.encoded[key]):,} {name}" for key, name in SPLITS.items() if data.has(key)]
    _write(
        folder,
        settings.model.name_or_path,
        module.task.peft_task_type,
        title=_title(settings),
        is_adapter=settings.lora is not None,
        evaluation=(settings, source, result),
        **usage(settings, module),
        data=f"{source}: {', '.join(counts)} rows.",
        results=_results(result),
        command=_command(run_dir),
        values=values,
    )


def write_import_card(folder: Path, settings: Settings, module: Trained, command: str) -> None:
    """Write the card of an imported adapter, whose data and results are unknown.

    Args:
        folder: Folder of the adapter.
        settings: Settings of the base model and the task.
        module: Module with the adapter.
        command: Command that imported it.
    """
    _write(
        folder,
        settings.model.name_or_path,
        module.task.peft_task_type,
        title=_title(settings),
        is_adapter=settings.lora is not None,
        **usage(settings, module),
        command="\n".join(fenced(command)),
        values={} if settings.lora is None else _lora_values(settings.lora, folder),
    )


def write_derived_card(folder: Path, command: str) -> None:
    """Write the card of an adapter made of others, by its files alone.

    Args:
        folder: Folder of the adapter.
        command: Command that made it.
    """
    files = AdapterFolder(folder)
    raw = json.loads(files.config.read_text(encoding="utf-8"))
    base = str(raw.get("base_model_name_or_path") or "an unknown base")
    _write(
        folder,
        base,
        raw.get("task_type"),
        title=f"A LoRA adapter of {base}",
        is_adapter=True,
        predict=files.sidecar.is_file(),
        command="\n".join(fenced(command)),
        values={"rank": raw["r"], "alpha": raw["lora_alpha"]},
    )


def _write(
    folder: Path,
    base: str,
    task_type: str | None,
    *,
    title: str,
    is_adapter: bool,
    evaluation: tuple[Settings, str, dict[str, Any]] | None = None,
    **content: Any,
) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    pipeline = PIPELINES.get(str(task_type), "text-generation")
    datasets = None
    evaluated: dict[str, Any] = {}
    if evaluation is not None:
        settings, source, result = evaluation
        datasets = [settings.data.path] if settings.data.path else None
        evaluated["eval_results"] = _eval_results(pipeline, settings, source, result)
        evaluated["model_name"] = title
    card_data = ModelCardData(
        # The hub refuses a base that is not one of its names.
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        datasets=datasets,
        library_name="peft" if is_adapter else None,
        pipeline_tag=pipeline,
        tags=[*(["lora"] if is_adapter else []), "lora_lightning"],
        **evaluated,
    )
    software = ", ".join(f"{name} {number}" for name, number in versions().items())
    card = ModelCard.from_template(
        card_data, template_str=TEMPLATE, title=title, versions=software, **content
    )
    atomic_write(AdapterFolder(folder).card, printable(card.content) + "\n")


def _eval_results(
    pipeline: str, settings: Settings, source: str, result: dict[str, Any]
) -> list[Any]:
    """Return the final metrics for the hub's model-index."""
    from huggingface_hub import EvalResult

    results = []
    for name in _metrics(result):
        split, _, metric = name.partition("/")
        results.append(
            EvalResult(
                task_type=pipeline,
                dataset_type=settings.data.path or "local",
                dataset_name=source,
                dataset_split=SPLITS[split],
                metric_type=metric,
                metric_value=round(float(result[name]), 6),
            )
        )
    return results


def _metrics(result: dict[str, Any]) -> list[str]:
    return sorted(name for name in result if name.startswith(("val/", "test/")))


def _title(settings: Settings) -> str:
    task, base = settings.task["name"], settings.model.name_or_path
    if settings.lora is None:
        return f"{task}: {base}, fully fine-tuned"
    return f"{task}: a LoRA adapter of {base}"


def _source(settings: Settings) -> str:
    """Return the name of the data: a hub name, or file names without their folders."""
    files = [getattr(settings.data, key) for key in SPLITS]
    names = dict.fromkeys(Path(str(value)).name for value in files if value)
    return settings.data.path or ", ".join(map(one_line, names)) or "the package's own"


def _results(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of the final metrics, with the values before training if measured."""
    before, baseline = result.get("before") or {}, result.get("baseline") or {}
    rows = []
    for name in _metrics(result):
        first = f"{before[name]:.4f}" if name in before else ""
        rows.append((name, first, f"{result[name]:.4f}"))
    for name in sorted(baseline.keys() - {"name"}):
        rows.append((f"{name}, {baseline['name']}", "", f"{baseline[name]:.4f}"))
    return rows


def _command(run_dir: Path) -> str:
    """Return the command of a run as Markdown, or "" if it is not known."""
    path = run_dir / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return ""
    with suppress(UserError):  # if damaged, the card omits the command
        # Unresolved: a shared card must not show values of environment variables.
        overrides = [
            item
            for item in read_overrides(path)
            if not item.lstrip("+").startswith(("output_dir=", "hydra"))
        ]
        return "\n".join(fenced(shlex.join(["lora-lightning", "train", *overrides])))
    return ""


def _lora_values(lora: LoraConfig, folder: Path) -> dict[str, Any]:
    stored = json.loads(AdapterFolder(folder).config.read_text(encoding="utf-8"))
    return {
        "rank": lora.rank,
        "alpha": lora.alpha_of(""),
        "scaling": lora.scaling_of(""),
        "targets": lora.targets,
        "initial values": lora.init,
        "stored as": f"rank {stored['r']}, alpha {stored['lora_alpha']}",
        "DoRA": lora.use_dora,
        "dropout": lora.dropout,
    }
