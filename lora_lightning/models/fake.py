"""Models on fake tensors: whole architectures without weights, for dry runs of a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora.module_index import head_modules

from .private_api import fake_tensors, first_expert_only

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Weights per scale in NF4, and scales per second-level scale."""
_ACTIVE: ContextVar[bool] = ContextVar("fake_models", default=False)


@contextmanager
def fake_models(device: torch.device) -> Iterator[None]:
    """Build models from their configs within the block, with tensors that have no values.

    On the "meta" device, models only have shapes to count. Other devices use fake tensors, which
    allow dry runs of steps.
    """
    token = _ACTIVE.set(True)
    fake = nullcontext() if device.type == "meta" else fake_tensors()
    try:
        with fake, torch.device(device), warnings.catch_warnings(), first_expert_only():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        _ACTIVE.reset(token)


def fakes_models() -> bool:
    """Return whether `fake_models` is active, so that there are no weights to read."""
    return _ACTIVE.get()


def build_fake(
    auto_class: Any, model_config: Any, config: ModelConfig, id2label: dict[int, str] | None = None
) -> nn.Module:
    """Build the model that a transformers config describes; call this within `fake_models`.

    Args:
        auto_class: The transformers class that loads the real model.
        model_config: The model's transformers config.
        config: This package's model settings.
        id2label: Class names of a classifier. Defaults to None, the names of the config.
    """
    dtype = getattr(torch, config.dtype, None) or model_config.dtype or torch.float32
    if id2label is not None:
        model_config.id2label = id2label
    model: nn.Module = auto_class.from_config(
        model_config,
        dtype=dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    if config.quantization is not None:
        compute_dtype = torch.bfloat16 if config.dtype == "auto" else dtype
        _quantize(model, compute_dtype, but=head_modules(model))
    return model


def _quantize(model: nn.Module, compute_dtype: torch.dtype, *, but: list[str]) -> None:
    """Replace the layers that bitsandbytes would quantize with `FakeNf4Linear`."""
    for name, module in list(model.named_modules()):
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and not any(name == other or name.startswith(f"{other}.") for other in but):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FakeNf4Linear(module, compute_dtype))


class FakeNf4Linear(nn.Module):
    """A 4-bit linear layer in the storage format of bitsandbytes, without values.

    A byte stores two weights. Each 64 weights have a scale of one byte, and each 256 scales have a
    scale of four bytes (section 3 of Dettmers et al. 2023, arXiv:2305.14314). There are two tables.
    Each matmul dequantizes the whole weight, forward and backward. It keeps neither the dequantized
    weight nor its input.

    Args:
        layer: nn.Linear or Conv1D, also without values.
        compute_dtype: Dtype of the matmul.
    """

    def __init__(self, layer: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        weight: Any = layer.weight
        shape = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        self.out_features, self.in_features = shape
        self.dtype, self.compute_dtype = weight.dtype, compute_dtype
        blocks = -(-weight.numel() // BLOCK)
        packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias: Any = layer.bias
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-blocks // BLOCK_OF_SCALES)))
        self.register_buffer("tables", torch.empty(16 + 256 + 1))

    def dequantized(self) -> Tensor:
        """Return the weight, (out, in), in the dtype that the weights were loaded in."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _Product.apply(x.to(self.compute_dtype), self)
        return output.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FakeNf4Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grad, ctx.layer.dequantized().to(grad.dtype)), None
