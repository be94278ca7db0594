"""The frozen base model with its adapter, built for a LightningModule."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lora_lightning.config.compatibility import check_combinations
from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.adapter_sharding import Placement, place_adapter
from lora_lightning.distributed.parallel_dims import ParallelDims
from lora_lightning.distributed.sharded_loading import local_rank_in_environment
from lora_lightning.distributed.strategies import (
    ShardedStrategy,
    check_full_fine_tuning,
    check_strategy,
)
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.initialization.loftq import initialize_loftq
from lora_lightning.lora.layers.trainable_tokens import rows_of_tokens
from lora_lightning.lora.rng import fork_rng
from lora_lightning.lora.summary import count
from lora_lightning.models.forward import compile_layers
from lora_lightning.models.tokenizer import token_ids
from lora_lightning.tasks import Task

from .data_init import find_start
from .warm_start import load_values


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with its adapter."""

    model: nn.Module
    adapter: Adapter | None
    """The adapter, or None in full fine-tuning."""
    lora_from_data: LoraConfig | None
    """Adapter settings that result from data-dependent initialization, or None."""
    total_parameters: int
    """Number of parameters, before a sharded strategy counts tied weights twice."""
    trainable_parameters: int
    placement: Placement | None
    """The part of the adapter that this rank holds when the base is sharded, or None."""


def build_adapted_model(
    task: Task,
    model_config: ModelConfig,
    lora_config: LoraConfig | None,
    tokenizer: Any,
    *,
    seed: int = 0,
    start_from: str | None = None,
    shards: ParallelDims | None = None,
    trainer: L.Trainer | None = None,
    data: Any = None,
) -> AdaptedModel:
    """Load a base model, freeze it and attach an adapter, which gets its initial values.

    Args:
        task: Task that builds the model and its head.
        model_config: Settings of the base model.
        lora_config: Settings of the adapter. None trains the whole model.
        tokenizer: Tokenizer of the base model.
        seed: Seed of the initial values. Defaults to 0.
        start_from: Adapter folder or checkpoint for a warm start. The values of a checkpoint are
            for the caller to load. Defaults to None.
        shards: Processes that the base is sharded over. Defaults to None.
        trainer: Trainer that the model is built for. Defaults to None.
        data: Data module for data-dependent initialization. Defaults to None, which selects the
            Trainer's.

    Raises:
        UserError: If the settings do not suit each other or the model.
    """
    if shards is not None and shards.tensor > 1 and model_config.compile:
        raise UserError(
            "model.compile is not supported with tensor parallelism, which cuts the matrices. Set "
            "model.compile=null, or use trainer=fsdp2."
        )
    check_combinations(model_config, lora_config, start_from=start_from, sharded=shards is not None)
    # The values of an earlier run replace the initial ones.
    earlier = start_from or str((trainer and trainer.ckpt_path) or "")
    adapter = lora_from_data = None
    with ExitStack() as stack:
        if shards is not None and trainer is not None:
            stack.enter_context(local_rank_in_environment(trainer.local_rank))
        stack.enter_context(fork_rng(_build_device(trainer)))
        torch.manual_seed(seed)
        model, head_modules = task.build_model(model_config, tokenizer, shards)
        if lora_config is not None:
            complete = _complete(lora_config, model, head_modules, model_config, tokenizer)
            matrices: dict[str, Tensor] = {}
            if lora_config.init == "eva":
                start = find_start(task, model, complete, data, trainer, earlier=earlier)
                complete, matrices = start.config, start.matrices
                lora_from_data = replace(
                    complete,
                    modules_to_save=lora_config.modules_to_save,
                    trainable_token_indices=lora_config.trainable_token_indices,
                )
            elif lora_config.init == "loftq":
                complete = replace(complete, init="kaiming")  # for layers that are not quantized
            adapter = Adapter(model, complete)
            adapter.set_initial_A(matrices)
            if lora_config.init == "loftq" and not earlier:
                original = replace(model_config, quantization=None)
                with torch.device("cpu"):  # there is no room for it beside the quantized model
                    initialize_loftq(adapter, task.build_model(original, tokenizer)[0])
            for layer in adapter.token_rows.values() if model_config.new_tokens else ():
                layer.start_at_mean()
            if start_from is not None and not start_from.endswith(".ckpt"):
                load_values(adapter, start_from)
    counts = (
        count(model.parameters()),
        count(p for p in model.parameters() if p.requires_grad),
    )
    placement = None
    if adapter is not None and shards is not None:
        placement = place_adapter(adapter, shards)
    if model_config.gradient_checkpointing:
        # Checkpointed blocks get no gradient unless the frozen embedding's output needs one.
        model.enable_input_require_grads()  # type: ignore[operator]
    if model_config.compile is not None:
        compile_layers(model)
    return AdaptedModel(model, adapter, lora_from_data, *counts, placement)


def _build_device(trainer: L.Trainer | None) -> torch.device:
    """Return the device to build the model on. A Trainer sets its device beforehand."""
    return torch.get_default_device() if trainer is None else trainer.strategy.root_device


def _complete(
    config: LoraConfig,
    model: nn.Module,
    head_modules: list[str],
    model_config: ModelConfig,
    tokenizer: Any,
) -> LoraConfig:
    """Return adapter settings with the modules and token rows that task and model add."""
    saved = list(dict.fromkeys([*config.modules_to_save, *head_modules]))
    rows = config.trainable_token_indices
    if model_config.new_tokens:
        rows = rows_of_tokens(model, token_ids(tokenizer, model_config.new_tokens))
    return replace(config, modules_to_save=saved, trainable_token_indices=rows)


def find_shards(trainer: L.Trainer | None, mesh: Any, *, full: bool) -> ParallelDims | None:
    """Return the processes that a Trainer's strategy shards the base over, or None.

    Args:
        trainer: Trainer of the module, or None.
        mesh: Device mesh that the strategy has given to the module, or None.
        full: Whether the whole model is trained.

    Raises:
        UserError: If the strategy is not supported.
    """
    if trainer is None:
        return None
    strategy = trainer.strategy
    check_strategy(type(strategy).__name__)
    if mesh is None:
        return None
    if not isinstance(strategy, ShardedStrategy):
        raise UserError(
            f"{type(strategy).__name__} is not supported: it does not know which gradients of an "
            "adapter to average. Use lora_lightning.strategies.ShardedStrategy, or trainer=fsdp2."
        )
    check_full_fine_tuning(strategy, full=full)
    return ParallelDims(mesh)
