"""CPU kernels for training that compute the same as torch where torch's own kernel is slow."""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from .private_api import attention_of, can_set_attention

ATTENTION = "sdpa_cpu"
"""Name of `attend` among transformers' attention implementations."""
PRIMITIVES = "256"
"""Compiled matmuls that oneDNN caches.

oneDNN's default of 1,024, one per batch length, took 240 MiB of a MiniLM's 1,580 MiB in bf16. It
saved no time. A pack of eight ranks uses some 70.
"""


def prepare_for_cpu(model: nn.Module, *, checkpoints: bool) -> None:
    """Switch a model to faster dropout and attention, and keep less memory.

    This registers an attention with transformers, under its own name. It also changes settings of
    the process: oneDNN caches fewer matmuls, and glibc returns freed blocks to the system. A model
    with `model.cpu_kernels=false` is not prepared.

    Args:
        model: A transformers model.
        checkpoints: Whether the model uses gradient checkpointing.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
    _set_attention(model)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)  # read on first use
    if checkpoints:
        _return_freed_memory()


class FastDropout(nn.Dropout):
    """Dropout layer that uses `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply `dropout` to an input of any shape."""
        return dropout(input, self.p, self.training)


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Apply dropout, five times as fast as torch on a CPU where torch has no library to draw with.

    On such a CPU, torch draws 64 random bits per element, one by one, for a uniform number.
    16 bits are enough. p is rounded to 1/65,536, and kept elements are scaled by the actual
    probability of keeping, so the expectation is exact.

    Args:
        input: Tensor of any shape.
        p: Probability of dropping an element. Defaults to 0.5.
        training: Whether to drop elements at all. Defaults to True.
    """
    plain = input.device.type != "cpu" or torch.compiler.is_compiling()
    if not training or plain or not 0 < round(p * 2**16) < 2**16:
        return nn.functional.dropout(input, p, training)
    return input * dropout_mask(input, p)


def dropout_mask(input: Tensor, p: float) -> Tensor:
    """Return dropout's multiplier, 0 for dropped elements and 1 / (1 - p) for the others.

    A torch mode can intercept this call like one of torch's own functions. Rows of several runs
    can then draw from separate generators.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(dropout_mask, (input,), input, p)
    cut, count = round(p * 2**16), input.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    mask = torch.empty(count, dtype=input.dtype)
    torch.ge(words.view(torch.int16)[:count], cut - 2**15, out=mask)
    return mask.mul_(2**16 / (2**16 - cut)).view(input.shape)


def _set_attention(model: nn.Module) -> None:
    """Set a model's attention to `attend` if it is transformers' "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    if not isinstance(model, PreTrainedModel) or attention_of(model.config) != "sdpa":
        return
    # Some models look for the name "sdpa" itself (transformers 5.23: Falcon, Gemma 4, GLM 5).
    source = Path(inspect.getfile(type(model))).read_text(encoding="utf-8")
    if not can_set_attention(model) or '_implementation == "sdpa"' in source:
        return
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' sdpa attention, with a faster path for training steps.

    The CPU kernel takes twice as long in bf16 as in fp32, forward and backward. It does not
    support dropout. With dropout, torch computes attention in single steps with its slow dropout.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    # Do not test requires_grad: packed jobs must draw the same random numbers as solo jobs.
    trains = module.training and torch.is_grad_enabled() and query.device.type == "cpu"
    if trains and dropout > 0.0 and _is_plain(module, query, key, attention_mask, options):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return _with_dropout(query, key, value, attention_mask, dropout, scaling), None
    if dtype != torch.bfloat16 or dropout > 0.0 or not trains:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, **options
        )
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide = (query.float(), key.float(), value.float())
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return output.to(dtype), None


def _is_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> bool:
    """Return whether attention is encoder attention, all to all except masked positions."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    others = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    return query.shape[1] == key.shape[1] and not others and (mask is not None or not causal)


def _with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scaling: float
) -> Tensor:
    """Compute attention with dropout of the attention weights.

    Args:
        query: (rows, heads, positions, width).
        key: (rows, heads, positions, width).
        value: (rows, heads, positions, width).
        mask: Broadcastable to (rows, heads, positions, positions). A boolean mask is true at
            visible positions. Any other mask is added to the scores.
        p: Probability of dropping a weight.
        scaling: Factor of the scores.

    Returns:
        Attention output, (rows, positions, heads, width).
    """
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = dropout(scores.softmax(-1), p)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def _return_freed_memory() -> None:
    """Let glibc return large blocks to the system when they are freed.

    By default, glibc keeps them. A checkpointed layer then leaves holes that the next layer does
    not fit. At 3,216 tokens of a model with 135 M parameters, the holes took 2 GB of 3.4 GB.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries lack this setting
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
