"""Results of a run, for result.json, TensorBoard and the console."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from omegaconf import DictConfig, OmegaConf

from lora_lightning.config.groups import Settings
from lora_lightning.data.datamodule import LoraDataModule
from lora_lightning.data.row_counts import row_warnings
from lora_lightning.tasks import Task
from lora_lightning.utils.memory import peak_memory_mib
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import command, say

from .callbacks.loggers import EventsLogger
from .callbacks.throughput import RunClock
from .module import LoraModule

FEW_STEPS = 20
"""Number of optimizer steps below which the user is warned, as they hardly teach anything."""


def row_facts(task: Task, data: LoraDataModule) -> dict[str, Any]:
    """Return the rows per split, the warnings and the baseline that qualify a run's metrics."""
    rows = {split: len(rows) for split, rows in data.encoded.items()}
    return {"baseline": baseline(task, data), "rows": rows, "warnings": row_warnings(data)}


def baseline(task: Task, data: LoraDataModule) -> dict[str, Any]:
    """Return what a rule without learning reaches on the rows of validation and test.

    A generative task uses only the rows that text is generated for.

    Every rank processes all rows. The metrics gather from all ranks, so means stay the same.
    """
    values: dict[str, Any] = {}
    for split in ("val", "test"):
        if not data.has(split) or (task.generative and not task.generate_rows):
            continue
        rows = data.raw[split]
        if task.generative:
            generated = data.encoded[split]["generate"][:]
            rows = rows.select([i for i, chosen in enumerate(generated) if chosen])
        if (rule := task.baseline(list(rows))) is not None:
            values["name"] = rule[0]
            values |= {f"{split}/{metric}": value for metric, value in rule[1].items()}
    return values


def measurements(
    config: DictConfig,
    module: LoraModule,
    trainer: L.Trainer,
    clock: RunClock,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Return the metrics, sizes, time and memory of a run that has ended."""
    device = trainer.strategy.root_device
    return {
        **metrics,
        "objective": metrics.get(config.task.monitor),
        "monitor": config.task.monitor,
        "trainable_parameters": module.trainable_parameters,
        "total_parameters": module.total_parameters,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(clock.seconds, 3),
        "tokens": clock.tokens,
        "tokens_per_second": round(clock.tokens / max(clock.seconds, 1e-9), 1),
        "peak_memory_mib": round(peak_memory_mib(device), 1),
        "device": str(device),
        "world_size": trainer.world_size,
        "seed": config.seed,
        "tags": list(config.tags),
    }


def log_hparams(
    trainer: L.Trainer, settings: Settings, config: DictConfig, result: dict[str, Any]
) -> None:
    """Fill TensorBoard's HPARAMS tab once, with settings and results.

    Results are columns there and not scalars. Each scalar would be a card with a single point.
    """
    lora = settings.lora
    params: dict[str, Any] = {
        "method": config.lora.method,
        "lr": settings.optim.lr,
        "weight_decay": settings.optim.weight_decay,
        "batch_size": settings.data.batch_size,
        "seed": config.seed,
        "model": settings.model.name_or_path,
        "task": settings.task["name"],
    }
    if lora is not None:
        params |= {
            "rank": lora.rank,
            "alpha": lora.alpha_of(""),
            "scaling": lora.scaling_of(""),
            "dropout": lora.dropout,
            "targets": str(lora.targets),
        }
    metrics = {name: value for name, value in result.items() if name.startswith(("val/", "test/"))}
    for logger in trainer.loggers:
        if isinstance(logger, EventsLogger):
            values = {**params, **_further(config, logger.varied), **metrics}
            varied = [COLUMNS.get(key, key) for key in logger.varied]
            first = [config.task.monitor, *varied, *CORE, *metrics]
            logger.fill_hparams(hparams_summaries(values, first))
            logger.save()


CORE = ("rank", "alpha", "scaling", "lr", "seed")
"""Columns of HPARAMS that precede all others except the monitored metric and varied settings."""
COLUMNS = {
    **{"lora.rank": "rank", "lora.alpha": "alpha", "lora.alpha_ratio": "scaling"},
    **{"lora.scale": "scaling", "lora.use_rslora": "scaling", "optim.lr": "lr", "seed": "seed"},
    **{"lora.dropout": "dropout", "lora.targets": "targets", "lora.method": "method"},
    **{"data.batch_size": "batch_size", "optim.weight_decay": "weight_decay"},
    **{"model.name_or_path": "model", "task.name": "task"},
}
"""Settings whose values are always columns of HPARAMS."""


def _further(config: DictConfig, keys: list[str]) -> dict[str, Any]:
    """Return a run's values of further settings in which the jobs of its sweep differ."""
    values: dict[str, Any] = {}
    for key in keys:
        value = OmegaConf.select(config, key)
        if key not in COLUMNS and not OmegaConf.is_config(value):
            values[key] = value if isinstance(value, (bool, int, float)) else str(value)
    return values


def hparams_summaries(values: dict[str, Any], first: list[str]) -> list[Any]:
    """Return the summaries that TensorBoard's HPARAMS tab reads, with a column for each value.

    TensorBoard 2.21 sorts columns by name and puts columns that differ between runs first. The
    first columns are therefore marked as differing, and their names begin with their position.
    TensorBoard shows their display name.

    Args:
        values: Settings and results by name.
        first: Names of the first columns, in order.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import hparams

    place = {name: f"{number:02} {name}" for number, name in enumerate(dict.fromkeys(first))}
    known = {name: value for name, value in values.items() if value is not None}
    _, start, end = hparams({place.get(name, name): value for name, value in known.items()}, {})
    kinds = {name: isinstance(value, str) for name, value in known.items()}
    text, number = api_pb2.DATA_TYPE_STRING, api_pb2.DATA_TYPE_FLOAT64
    # TensorBoard takes the columns from one run, so each run lists all permanent columns.
    columns = [
        api_pb2.HParamInfo(
            name=place.get(name, name),
            display_name=name,
            type=text if kinds.get(name) else number,
            differs=name in place,
        )
        for name in {**place, **known}
    ]
    content = plugin_data_pb2.HParamsPluginData(experiment=api_pb2.Experiment(hparam_infos=columns))
    described = metadata.create_summary_metadata(content)
    tag = metadata.EXPERIMENT_TAG
    experiment = Summary(value=[Summary.Value(tag=tag, metadata=described)])
    return [experiment, start, end]


def report_early_stop(trainer: L.Trainer) -> None:
    """Report why early stopping has ended the training, if it has."""
    for callback in trainer.early_stopping_callbacks:
        reason = callback.stopping_reason
        why = str(callback.stopping_reason_message)
        if reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
            why = (
                f"{callback.monitor} has not improved on {callback.best_score:.4f} for "
                f"{callback.patience} validations. To wait longer: "
                "callbacks.early_stopping.patience=N."
            )
        if trainer.is_global_zero and reason != EarlyStoppingReason.NOT_STOPPED:
            say(f"stopped early, after step {trainer.global_step}: {why}", flush=True)


def print_result(result: dict[str, Any], run_dir: Path, data: LoraDataModule) -> None:
    """Print a summary of the results and the next possible commands."""
    rows = len(data.encoded["test"]) if data.has("test") else 0
    before = result["before"]
    adapter = RunFolder(run_dir).adapter
    lines = []
    for name in sorted(name for name in result if name.startswith("test/")):
        short = name.removeprefix("test/")
        start = f"{before[name]:.4f} -> " if name in before else ""
        beside = ""
        if name in result["baseline"]:
            beside = f"   ({result['baseline']['name']}: {result['baseline'][name]:.4f})"
        lines.append(f"  {short:<14} {start}{result[name]:.4f}{beside}")
    if lines:
        arrow = ", before -> after training" if any(n.startswith("test/") for n in before) else ""
        lines.insert(0, f"On the {rows} test rows{arrow}:")
    for name in before:
        if name.startswith("val/") and name in result:
            lines.append(f"{name.removeprefix('val/')}: {before[name]:.4f} -> {result[name]:.4f}")
    share = 100 * result["trainable_parameters"] / result["total_parameters"]
    lines += [
        f"Trained {result['trainable_parameters']:,} of {result['total_parameters']:,} parameters "
        f"({share:.2f} %) in {result['seconds']:.{0 if result['seconds'] >= 10 else 1}f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s.",
        f"Adapter: {adapter} ({result['adapter_bytes'] / 1e6:.2f} MB with the tokenizer)",
        f'Try it:  {command("predict", adapter=adapter)} text="..."',
        f"Curves:  tensorboard --logdir {shlex.quote(str(run_dir))}",
    ]
    lines[-3:-3] = [f"WARNING {line}" for line in result["warnings"]]
    if result["steps"] < FEW_STEPS:
        lines.insert(
            -3,
            f"Only {result['steps']} optimizer steps were taken. For more: a smaller "
            "data.batch_size, or a larger trainer.max_epochs.",
        )
    say("\n" + "\n".join(lines), flush=True)
