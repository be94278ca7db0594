"""Preparation of a fit: checks, equal weights on all ranks, and layers that compute together."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import lightning as L
import torch

from lora_lightning.distributed.parallel_dims import broadcast, equal_over_ranks
from lora_lightning.lora import UserError
from lora_lightning.lora.products import joins_products
from lora_lightning.models.fingerprint import fingerprint
from lora_lightning.models.forward import check_packing, run_once
from lora_lightning.models.quantization import note_on_experts
from lora_lightning.utils.terminal import say

if TYPE_CHECKING:
    from .module import LoraModule


def prepare_fit(module: LoraModule) -> None:
    """Check a module before it is fit, and give all ranks the same trainable tensors.

    Raises:
        UserError: If the module cannot be trained as it is.
    """
    trainer = module.trainer
    check_packed_rows(module)
    check_trainable_types(module)
    if module.model_config.quantization is not None and trainer.is_global_zero:
        say(note_on_experts(module.model), end="", file=sys.stderr)
    if trainer.world_size > 1:
        with module.whole_adapter():
            broadcast(module.trainable_tensors().values())
        if module.shards is None:
            check_same_base(module)
    if module.adapter is not None and module.shards is None and joins_products(module.device):
        # One pass finds the layers with a common input, and later passes compute them together.
        # Without this pass, the first step of a resumed run computes differently.
        with trainer.precision_plugin.forward_context():
            run_once(module.model, encoder_decoder=getattr(module.task, "encoder_decoder", False))


def check_packed_rows(module: LoraModule) -> None:
    """Raise UserError if the model mixes rows that the data module packs."""
    data = getattr(module.trainer, "datamodule", None)
    if data is not None and data.packs:
        with module.trainer.precision_plugin.forward_context():
            check_packing(module.model)


def report_doubts(trainer: L.Trainer) -> None:
    """Print the data module's warnings about its rows.

    This follows the building of the model, so that an error in the model is reported alone.
    """
    tell = getattr(getattr(trainer, "datamodule", None), "warn_about_rows", None)
    if tell is not None and trainer.is_global_zero:
        tell()


def check_trainable_types(module: LoraModule) -> None:
    """Raise UserError if a trainable tensor is in half precision."""
    for name, tensor in module.trainable_tensors().items():
        if tensor.requires_grad and tensor.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"{name} is {tensor.dtype}, which would round away most updates: trainable tensors "
                "must be fp32. Use Trainer(precision='32-true') or 'bf16-mixed'; "
                "ModelConfig(dtype='bfloat16') sets the type of the frozen weights."
            )


def check_same_base(module: LoraModule) -> None:
    """Raise UserError if ranks have read different files, since the base is not broadcast."""
    frozen = ((n, p) for n, p in module.named_parameters() if not p.requires_grad)
    if not equal_over_ranks(int(fingerprint(frozen)[:15], 16), module.device):
        raise UserError(
            f"model.name_or_path={module.model_config.name_or_path}: the processes of this run "
            "have loaded different weights. Give all of them the same files."
        )
