"""How a loaded model is run: compiled, on joined rows, to logits."""

from __future__ import annotations

import inspect
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .lora.errors import UserError


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def compile_layers(model: nn.Module) -> None:
    """Compiles each of the model's repeated layers; the same code then serves them all.

    Raises:
        UserError: the model has no layers that transformers marks as such.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.compile=layer: a {type(model).__name__} has no layers that could be compiled "
            "one by one. Leave it out."
        )
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise UserError(
            "model.compile=layer needs a C++ compiler on a CPU, such as g++. Install one, or leave "
            "it out."
        )
    for layer in layers:
        layer.compile(dynamic=True)


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Runs compiled layers as they are: a cache that grows would have them compiled anew."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Makes sure that rows joined to one, told apart by position ids, do not see each other.

    Raises:
        UserError: they do, in this model with this attention.
    """
    device = next(model.parameters()).device
    first, second = (
        torch.arange(3, 10, device=device)[None],
        torch.arange(8, 3, -1, device=device)[None],
    )
    joined = torch.cat([first, second], dim=1)
    counts = [torch.arange(part.shape[1], device=device) for part in (first, second)]
    was_training = model.training
    model.eval()
    alone = model(input_ids=second, use_cache=False).logits
    seeing = model(input_ids=joined, use_cache=False).logits[:, first.shape[1] :]
    error = torch.tensor(float("inf"))
    if accepts(model, "position_ids"):
        positions = torch.cat(counts)[None]
        packed = model(input_ids=joined, position_ids=positions, use_cache=False).logits
        error = (packed[:, first.shape[1] :] - alone).abs().max()
    model.train(was_training)
    if not error <= 0.05 * (seeing - alone).abs().max():
        raise UserError(
            f"data.packing=true: in a {type(model).__name__} with attention "
            f"{getattr(model.config, '_attn_implementation', None)!r} joined rows would see each "
            "other. Leave packing off (for task=lm also task.blocks=false), or try "
            "model.attn_implementation=sdpa or eager."
        )


def classification_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Class logits, (rows, classes).

    A decoder is pooled at the last position that the attention mask admits. transformers pools at
    the last token that is not the padding id, which goes wrong where the padding id is EOS and
    the text ends with one.
    """
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    score = getattr(model, "score", None)
    backbone = getattr(model, str(getattr(model, "base_model_prefix", "")) or "-", None)
    if score is None or backbone is None or backbone is model:
        return model(**inputs).logits  # type: ignore[no-any-return]
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    mask = inputs["attention_mask"]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return score(hidden[torch.arange(len(last), device=mask.device), last])  # type: ignore[no-any-return]


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
