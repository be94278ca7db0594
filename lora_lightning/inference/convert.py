"""Conversion of checkpoints and other tools' adapters: `lora-lightning import`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lora_lightning.adapters.folder import CARD, AdapterFolder
from lora_lightning.adapters.formats import PARTS, read_layout
from lora_lightning.adapters.model_card import write_import_card
from lora_lightning.adapters.save import base_fingerprint, save_trained
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
    check_links,
    check_plain,
    settings_from_file,
)
from lora_lightning.lora import LoraConfig, UserError, read_adapter
from lora_lightning.lora.arithmetic import Update
from lora_lightning.lora.embeddings import make_room
from lora_lightning.lora.serialization.load import adapter_from
from lora_lightning.lora.serialization.peft_config import from_peft_config, ties_updates
from lora_lightning.models.model_config import load_model_config
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.tasks import build_task
from lora_lightning.training.checkpointing import read_checkpoint
from lora_lightning.training.module import LoraModule
from lora_lightning.utils.output_folders import check_replaceable
from lora_lightning.utils.quiet import quiet_libraries
from lora_lightning.utils.run_folder import RunFolder, check_not_in_run

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
    """Write an adapter folder from a run's checkpoint, a PEFT folder, or another tool's file.

    Args:
        source: .ckpt file of a run, PEFT folder, or safetensors file (see `adapters.formats`).
        output: New folder.
        overrides: Settings of the base model and the task, as for training.
        alpha: Alpha, for a layout that does not store it. Defaults to None.
        parts: Adapted parts, for a layout that does not store them. Defaults to q, k and v.

    Returns:
        The module with the imported adapter or model.

    Raises:
        UserError: The source cannot be used, or does not fit the base model or the task.
    """
    quiet_libraries()
    check_not_in_run(output)
    check_replaceable(output, by="import", sources=[source])
    for override in overrides:
        if override.lstrip("+").startswith("lora"):
            raise UserError(
                f"{override}: not supported by import, which keeps the adapter as it is. Leave it "
                "out (for a file without alpha: alpha=A)."
            )
    if alpha is not None and (source.suffix == ".ckpt" or source.is_dir()):
        raise UserError(f"alpha={alpha:g}: source={source} holds its own alpha. Leave it out.")
    if source.suffix == ".ckpt":
        module, config = _from_checkpoint(source, overrides)
    elif source.is_dir():
        module, config = _from_peft(source, overrides)
    elif source.is_file():
        _check_base_and_task(source, overrides)
        config = compose_config(overrides)
        module, whole = _bare(config)
        updates = read_layout(source, module.model, alpha=alpha, parts=parts)
        _attach(module, whole, *_as_peft(updates), source)
    else:
        raise UserError(f"source={source}: file or folder not found.")
    saved = saved_settings(config)
    if module.adapter is not None and source.suffix != ".ckpt":
        saved["lora"] = {**asdict(module.adapter.config), "method": "lora"}
    sources = (source, module.model_config.name_or_path)
    base = base_fingerprint(module)
    save_trained(module, output, saved, base=base, by="import", sources=sources, later=[CARD])
    lora = None if module.adapter is None else module.adapter.config
    words = ["lora-lightning", "import", f"source={source}", *overrides]
    words += [] if alpha is None else [f"alpha={alpha:g}"]
    words += [] if tuple(parts) == PARTS else [f"parts={','.join(parts)}"]
    write_import_card(output, replace(settings_of(config), lora=lora), module, shlex.join(words))
    return module


def _keys(overrides: list[str]) -> set[str]:
    """Return the keys that overrides set."""
    return {override.lstrip("+").partition("=")[0] for override in overrides}


def _check_base_and_task(source: Path, overrides: list[str]) -> None:
    """Raise UserError if defaults would replace settings that the file does not hold."""
    typed = _keys(overrides)
    missing = [] if typed & {"model", "model.name_or_path"} else ["model.name_or_path=..."]
    missing += [] if "task" in typed else ["task=NAME"]
    if missing:
        raise UserError(
            f"source={source}: does not store its base model and task. Type {' '.join(missing)}."
        )


def _from_checkpoint(path: Path, overrides: list[str]) -> tuple[LoraModule, DictConfig]:
    """Return the module of a checkpoint, with the settings stored in it."""
    content = read_checkpoint(path)
    saved = content.get(LoraModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    if not {"task", "model", "lora", "optim", "seed", "task_state"} <= saved.keys():
        raise UserError(f"source={path}: must be a checkpoint of lora_lightning.")
    saved = arguments_from_file(saved, path)
    lora = {"method": "full"} if saved["lora"] is None else {**saved["lora"], "method": "lora"}
    groups = {**{name: saved[name] for name in ("model", "task", "optim")}, "lora": lora}
    config = over_saved({**groups, "data": _data_of_run(path)}, overrides)
    settings = settings_of(config)
    module = LoraModule(
        settings.task,
        settings.model,
        settings.lora,
        settings.optim,
        seed=saved["seed"],
        task_state=saved["task_state"],
    )
    module.configure_model()
    module.load_state_dict(content["state_dict"])
    return module, config


def _data_of_run(checkpoint: Path) -> dict[str, Any]:
    """Return the data settings of a checkpoint's run, or the defaults if its config is absent."""
    path = RunFolder(checkpoint.parent.parent).config
    if not path.is_file():
        return asdict(DataConfig())
    config = OmegaConf.to_container(read_config(path), resolve=False)
    assert isinstance(config, dict)
    return settings_from_file({"data": config.get("data") or {}}, path)["data"]


def _from_peft(folder: Path, overrides: list[str]) -> tuple[LoraModule, DictConfig]:
    """Return a PEFT adapter on its base, which its config names unless an override does."""
    files = AdapterFolder(folder)
    checkpoints = sorted(folder.glob("*.ckpt"))
    if checkpoints and not files.config.is_file():
        raise UserError(f"source={folder}: holds checkpoints. Name one: source={checkpoints[-1]}")
    check_links(folder)
    raw, tensors = read_adapter(folder)
    lora = from_peft_config(raw)
    typed = _keys(overrides)
    kind, base = raw.get("task_type"), raw.get("base_model_name_or_path")
    check_plain([kind, base], str(files.config))
    task = [f"task={TASKS[kind]}"] if "task" not in typed and kind in TASKS else []
    config = compose_config([*task, *overrides])
    if isinstance(base, str) and not typed & {"model", "model.name_or_path"}:
        config.model.name_or_path = base
    tokenizer = str(folder) if files.tokenizer_config.is_file() else None
    module, whole = _bare(config, kind=kind, tokenizer=tokenizer)
    make_room(module.model, lora, tensors, folder)
    _attach(module, whole, lora, tensors, folder, together=ties_updates(raw))
    return module, config


def _bare(
    config: DictConfig, *, kind: str | None = None, tokenizer: str | None = None
) -> tuple[LoraModule, list[str]]:
    """Return the base model of a config, ready for its task, and its fully trained modules.

    Args:
        config: Composed config.
        kind: PEFT task type that the adapter was trained for, if known. Defaults to None.
        tokenizer: Folder of a tokenizer. Defaults to None, the base's own.
    """
    settings = settings_of(config)
    task = build_task(settings.task)
    loaded = load_tokenizer(
        replace(settings.model, tokenizer=tokenizer or settings.model.tokenizer)
    )
    task.prepare(load_model_config(settings.model))
    if kind not in (None, task.peft_task_type):
        raise UserError(
            f"task={task.name}: is for {task.peft_task_type}, but the adapter is for {kind}. Name "
            "the task that it was trained for: task=NAME."
        )
    task.learn_from_settings()
    module = LoraModule(task, settings.model, None, settings.optim, tokenizer=loaded)
    model, whole = task.build_model(settings.model, loaded)
    module.adopt(model, None)
    return module, whole


def _attach(
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
            f"source={source}: holds no {', '.join(new)}, which task={module.task.name} requires. "
            "Name the task that it was trained for: task=NAME."
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
        rank_pattern={name: each for name, each in ranks.items() if each != rank},
        alpha_pattern={name: each for name, each in alphas.items() if each != alpha},
    )
    tensors = {}
    for name, update in updates.items():
        tensors[f"{name}.lora_A.weight"] = update.lora_A.float()
        tensors[f"{name}.lora_B.weight"] = update.lora_B.float()
    return config, tensors
