"""The model card, README.md in an adapter folder: contents and training of the adapter."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from lora_lightning.config.groups import Settings
from lora_lightning.config.saved import read_overrides
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.errors import UserError
from lora_lightning.utils.atomic_write import atomic_write
from lora_lightning.utils.run_folder import RunFolder
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
    files = [getattr(settings.data, key) for key in SPLITS]
    names = dict.fromkeys(Path(str(value)).name for value in files if value)
    source = settings.data.path or ", ".join(map(one_line, names)) or "the package's own"
    counts = [f"{len(data.encoded[key]):,} {name}" for key, name in SPLITS.items() if data.has(key)]
    share = 100 * result["trainable_parameters"] / result["total_parameters"]
    _write_with_settings(
        folder,
        settings,
        module,
        evaluated=(source, result),
        data=f"{source}: {', '.join(counts)} rows.",
        results=_results(result),
        command=_command(run_dir),
        values={
            "learning rate": settings.optim.lr,
            "optimizer": settings.optim.name,
            "steps": result["steps"],
            "trained parameters": f"{result['trainable_parameters']:,} ({share:.2f} %)",
            "seconds": round(result["seconds"]),
            "peak memory, MiB": round(result["peak_memory_mib"]),
            "seed": result["seed"],
        },
    )


def write_import_card(folder: Path, settings: Settings, module: Trained, command: str) -> None:
    """Write the card of an imported adapter, whose data and results are unknown.

    Args:
        folder: Folder of the adapter.
        settings: Settings of the base model and the task.
        module: Module with the adapter.
        command: Command that imported it.
    """
    _write_with_settings(folder, settings, module, command=command, values={})


def write_derived_card(folder: Path, command: str) -> None:
    """Write the card of an adapter made of others, by its files alone.

    Args:
        folder: Folder of the adapter.
        command: Command that made it.
    """
    files = AdapterFolder(folder)
    config = json.loads(files.config.read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path") or "an unknown base")
    _write(
        folder,
        _metadata(base, config.get("task_type")),
        title=f"A LoRA adapter of {base}",
        predict=files.sidecar.is_file(),
        command=command,
        values={"rank": config["r"], "alpha": config["lora_alpha"]},
    )


def _write_with_settings(
    folder: Path,
    settings: Settings,
    module: Trained,
    *,
    values: dict[str, Any],
    evaluated: tuple[str, dict[str, Any]] | None = None,
    **content: Any,
) -> None:
    """Write a card with the settings and the use of an adapter or a whole model."""
    base, lora, task_type = settings.model.name_or_path, settings.lora, module.task.peft_task_type
    title = f"{settings.task['name']}: {base}, fully fine-tuned"
    if lora is not None:
        title = f"{settings.task['name']}: a LoRA adapter of {base}"
        stored = json.loads(AdapterFolder(folder).config.read_text(encoding="utf-8"))
        values = {
            "rank": lora.rank,
            "alpha": lora.alpha_of(""),
            "scaling": lora.scaling_of(""),
            "targets": lora.targets,
            "initial values": lora.init,
            "stored as": f"rank {stored['r']}, alpha {stored['lora_alpha']}",
            "DoRA": lora.use_dora,
            "dropout": lora.dropout,
            **values,
        }
    metadata = _metadata(base, task_type, is_adapter=lora is not None)
    if evaluated is not None:
        metadata["datasets"] = [settings.data.path] if settings.data.path else None
        metadata["model_name"] = title
        metadata["eval_results"] = [
            {
                "task_type": metadata["pipeline_tag"],
                "dataset_type": settings.data.path or "local",
                "dataset_name": evaluated[0],
                "dataset_split": SPLITS[name.partition("/")[0]],
                "metric_type": name.partition("/")[2],
                "metric_value": round(float(evaluated[1][name]), 6),
            }
            for name in _metrics(evaluated[1])
        ]
    _write(folder, metadata, title=title, values=values, **usage(settings, module), **content)


def _metadata(base: str, task_type: str | None, *, is_adapter: bool = True) -> dict[str, Any]:
    """Return arguments of ModelCardData."""
    return {
        # The hub refuses a base that is not one of its names.
        "base_model": base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None,
        "library_name": "peft" if is_adapter else None,
        "pipeline_tag": PIPELINES.get(str(task_type), "text-generation"),
        "tags": ["lora", "lora_lightning"] if is_adapter else ["lora_lightning"],
    }


def _write(folder: Path, metadata: dict[str, Any], *, command: str, **content: Any) -> None:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    if "eval_results" in metadata:
        metadata["eval_results"] = [EvalResult(**result) for result in metadata["eval_results"]]
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=TEMPLATE,
        command="\n".join(fenced(command)) if command else "",
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        **content,
    )
    atomic_write(AdapterFolder(folder).card, printable(card.content) + "\n")


def _metrics(result: dict[str, Any]) -> list[str]:
    return sorted(name for name in result if name.startswith(("val/", "test/")))


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
    """Return the command of a run, or "" if it is not known."""
    path = RunFolder(run_dir).overrides
    try:
        overrides = read_overrides(path)  # unresolved, so without values of the environment
    except UserError:
        return ""
    if not path.is_file():
        return ""
    hidden = ("output_dir=", "hydra")
    words = [item for item in overrides if not item.lstrip("+").startswith(hidden)]
    return shlex.join(["lora-lightning", "train", *words])
