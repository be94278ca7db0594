"""Conversion of other adapters to adapter folders of ours: `lora-lightning import`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lora_lightning.adapters.folder import base_fingerprint, refuse_run, save_trained
from lora_lightning.adapters.formats import PARTS, read_layout
from lora_lightning.config.compose import (
    compose_config,
    over_saved,
    saved_settings,
    settings_of,
)
from lora_lightning.config.saved import read_config
from lora_lightning.config.schema import DataConfig
from lora_lightning.config.untrusted import (
    arguments_from_file,
    check_plain,
    refuse_links,
    settings_from_file,
)
from lora_lightning.lora import LoraConfig, UserError, read_adapter
from lora_lightning.lora.arithmetic import Update
from lora_lightning.lora.embeddings import make_room
from lora_lightning.lora.serialization.load import adapter_from
from lora_lightning.lora.serialization.peft_config import (
    CONFIG_NAME,
    from_peft_config,
    ties_updates,
)
from lora_lightning.models.loading import load_model_config, load_tokenizer
from lora_lightning.tasks import build_task
from lora_lightning.training.checkpointing import read_checkpoint
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.output_folders import refuse_loss
from lora_lightning.utils.quiet import quiet_libraries

TASKS = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "summarization"}
"""Tasks by PEFT task type, if the type has only one task."""


def import_adapter(
    source: Path,
    output: Path,
    overrides: list[str],
    *,
    alpha: float | None = None,
    parts: Sequence[str] = PARTS,
) -> LoraModule:
    """Write an adapter folder of ours from a checkpoint of ours, a PEFT folder, or another tool.

    Args:
        source: .ckpt file of a run, PEFT folder, or safetensors file (see `adapters.formats`).
        output: new folder.
        overrides: settings of the base model and the task, as for training.
        alpha: alpha of a layout that does not store it.
        parts: adapted parts, for a layout that does not store which of q, k and v are adapted.

    Returns:
        The module with the imported adapter or model.

    Raises:
        UserError: the source cannot be used, or does not fit the base model or the task.
    """
    quiet_libraries()
    refuse_run(output)
    refuse_loss(output, by="import", sources=[source])
    for override in overrides:
        if override.lstrip("+").startswith("lora"):
            raise UserError(
                f"{override}: import takes an adapter as it is. Where a file holds no alpha, "
                "alpha=A says it."
            )
    if alpha is not None and (source.suffix == ".ckpt" or source.is_dir()):
        raise UserError(f"alpha={alpha:g}: source={source} says its alpha itself: leave it out.")
    if source.suffix == ".ckpt":
        module, config = _from_checkpoint(source, overrides)
    elif source.is_dir():
        module, config = _from_peft(source, overrides)
    elif source.is_file():
        _need_base_and_task(source, overrides)
        config = compose_config(overrides)
        module, whole = _bare(config)
        updates = read_layout(source, module.model, alpha=alpha, parts=parts)
        _put_on(module, whole, *_as_peft(updates), source)
    else:
        raise UserError(f"source={source}: there is no such file or folder.")
    saved = saved_settings(config)
    if module.adapter is not None and source.suffix != ".ckpt":
        saved["lora"] = {**asdict(module.adapter.config), "method": "lora"}
    sources = (source, module.model_config.name_or_path)
    save_trained(module, output, saved, base=base_fingerprint(module), by="import", sources=sources)
    return module


def _chosen(overrides: list[str]) -> set[str]:
    """Return the keys that overrides set."""
    return {override.lstrip("+").partition("=")[0] for override in overrides}


def _need_base_and_task(source: Path, overrides: list[str]) -> None:
    """Raise UserError if defaults would replace settings that the file does not hold."""
    chosen = _chosen(overrides)
    lacking = [] if chosen & {"model", "model.name_or_path"} else ["model.name_or_path=..."]
    lacking += [] if "task" in chosen else ["task=NAME"]
    if lacking:
        raise UserError(
            f"source={source} does not tell its base model and task: give {' and '.join(lacking)}."
        )


def _from_checkpoint(path: Path, overrides: list[str]) -> tuple[LoraModule, DictConfig]:
    """Return the module of a checkpoint, with the settings stored in it."""
    content = read_checkpoint(path)
    own = content.get(LoraModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if not {"task", "model", "lora", "optim", "seed", "task_state"} <= own.keys():
        raise UserError(f"{path} is no checkpoint of lora_lightning.")
    own = arguments_from_file(own, path)
    lora = {"method": "full"} if own["lora"] is None else {**own["lora"], "method": "lora"}
    groups = {"model": own["model"], "task": own["task"], "optim": own["optim"], "lora": lora}
    config = over_saved({**groups, "data": _data_of_run(path)}, overrides)
    settings = settings_of(config)
    module = LoraModule(
        settings.task,
        settings.model,
        settings.lora,
        settings.optim,
        seed=own["seed"],
        task_state=own["task_state"],
    )
    module.configure_model()
    module.load_state_dict(content["state_dict"])
    return module, config


def _data_of_run(checkpoint: Path) -> dict[str, Any]:
    """Return the data settings of a checkpoint's run, or the defaults if its config is absent."""
    path = checkpoint.parent.parent / ".hydra" / "config.yaml"
    if not path.is_file():
        return asdict(DataConfig())
    config = OmegaConf.to_container(read_config(path), resolve=False)
    assert isinstance(config, dict)
    return settings_from_file({"data": config.get("data") or {}}, path)["data"]


def _from_peft(folder: Path, overrides: list[str]) -> tuple[LoraModule, DictConfig]:
    """Return a PEFT adapter on its base, which its config names unless an override does."""
    checkpoints = sorted(folder.glob("*.ckpt"))
    if checkpoints and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"source={folder} holds checkpoints: name one, source={checkpoints[-1]}.")
    refuse_links(folder)
    raw, tensors = read_adapter(folder)
    lora = from_peft_config(raw)
    chosen = _chosen(overrides)
    kind, base = raw.get("task_type"), raw.get("base_model_name_or_path")
    check_plain([kind, base], f"{folder / CONFIG_NAME}")
    told = [f"task={TASKS[kind]}"] if "task" not in chosen and kind in TASKS else []
    config = compose_config([*told, *overrides])
    if isinstance(base, str) and not chosen & {"model", "model.name_or_path"}:
        config.model.name_or_path = base
    with_tokenizer = (folder / "tokenizer_config.json").is_file()
    module, whole = _bare(config, kind=kind, tokenizer=str(folder) if with_tokenizer else None)
    make_room(module.model, lora, tensors, folder)
    _put_on(module, whole, lora, tensors, folder, together=ties_updates(raw))
    return module, config


def _bare(
    config: DictConfig, *, kind: str | None = None, tokenizer: str | None = None
) -> tuple[LoraModule, list[str]]:
    """Return the base model of a config, ready for its task, and its fully trained modules.

    Args:
        config: composed config.
        kind: PEFT task type that the adapter was trained for, if known.
        tokenizer: folder of a tokenizer other than the base's.
    """
    settings = settings_of(config)
    task = build_task(settings.task)
    if tokenizer is None:
        loaded = load_tokenizer(settings.model)
    else:
        loaded = load_tokenizer(replace(settings.model, tokenizer=tokenizer))
    task.prepare(load_model_config(settings.model))
    if kind not in (None, task.peft_task_type):
        raise UserError(
            f"the adapter is for {kind}, and task={task.name} for {task.peft_task_type}: give the "
            "task that it was trained for, task=NAME."
        )
    task.learn_nothing()
    module = LoraModule(task, settings.model, None, settings.optim, tokenizer=loaded)
    model, whole = task.build_model(settings.model, loaded)
    module.adopt(model, None)
    return module, whole


def _put_on(
    module: LoraModule,
    whole: list[str],
    config: LoraConfig,
    tensors: dict[str, Tensor],
    source: Path,
    *,
    together: bool = False,
) -> None:
    adapter = adapter_from(module.model, config, tensors, source, together=together)
    new = [name for name in whole if name not in adapter.saved_modules]
    if new:
        raise UserError(
            f"{source} holds no {', '.join(new)}, which task={module.task.name} puts on "
            f"{module.model_config.name_or_path} untrained. Was it trained for another task?"
        )
    module.adopt(module.model, adapter)


def _as_peft(updates: dict[str, Update]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return updates as the settings and tensors of a plain adapter."""
    ranks = {name: update.lora_A.shape[0] for name, update in updates.items()}
    alphas = {name: update.scaling * ranks[name] for name, update in updates.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config = LoraConfig(
        rank=int(rank),
        alpha=alpha,
        targets=list(updates),
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
    )
    tensors = {}
    for name, update in updates.items():
        tensors[f"{name}.lora_A.weight"] = update.lora_A.float()
        tensors[f"{name}.lora_B.weight"] = update.lora_B.float()
    return config, tensors
