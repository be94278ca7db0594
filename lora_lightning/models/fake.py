"""Models of shapes alone: whole architectures that hold no weights, to rehearse a step with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora.target_modules import head_modules

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Weights that share a scale in NF4, and scales that share one of their own."""
_ACTIVE: ContextVar[bool] = ContextVar("skeletons", default=False)


@contextmanager
def skeletons(device: torch.device) -> Iterator[None]:
    """Under it models are built from their configs, on a device, and no tensor has values.

    On "meta" they have shapes to be counted; on another device steps can be gone through.
    """
    token = _ACTIVE.set(True)
    fake = nullcontext() if device.type == "meta" else FakeTensorMode()
    try:
        with fake, torch.device(device), warnings.catch_warnings(), _experts_alike():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def _experts_alike() -> Iterator[None]:
    """Sends all rows through the first expert: whose they are, values would tell.

    What a product holds is the same, whichever experts take part in it.
    """
    from transformers.integrations import moe

    own = moe._grouped_mm
    moe._grouped_mm = lambda input, weight, offs: input.to(weight.dtype) @ weight[0]
    try:
        yield
    finally:
        moe._grouped_mm = own


def wants_skeletons() -> bool:
    """Whether `skeletons` is in force: there are no weights to read then."""
    return _ACTIVE.get()


@contextmanager
def rows_alone() -> Iterator[None]:
    """Has transformers take each row for one sequence, and need no mask to keep several apart.

    It looks at the position ids to find that out, and at ids without values it cannot.
    """
    from transformers import masking_utils

    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def build_skeleton(
    auto_class: Any, model_config: Any, config: ModelConfig, id2label: dict[int, str] | None = None
) -> nn.Module:
    """The model that a config of transformers describes, to be called under `skeletons`.

    Args:
        auto_class: the class of transformers that would load it.
        model_config: its config.
        config: our settings of it.
        id2label: names of a classifier's classes; None: as the config says.
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
        _quantise(model, compute_dtype, but=head_modules(model))
    return model


def _quantise(model: nn.Module, compute_dtype: torch.dtype, *, but: list[str]) -> None:
    """Puts `Nf4Skeleton` in the place of the layers that bitsandbytes would quantise."""
    for name, module in list(model.named_modules()):
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and not any(name == other or name.startswith(f"{other}.") for other in but):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Nf4Skeleton(module, compute_dtype))


class Nf4Skeleton(nn.Module):
    """A linear layer in 4 bits as bitsandbytes keeps it, without values.

    Two weights in a byte; a scale of one byte for each 64, and one of four for each 256 of those
    (section 3 of Dettmers et al. 2023, arXiv:2305.14314); two tables. Each product takes the whole
    weight apart, forward and backward, and keeps neither it nor its input.

    Args:
        layer: nn.Linear or Conv1D, a skeleton too.
        compute_dtype: of the product.
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
        """(out, in), in the type that the weights were loaded in."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _Product.apply(x.to(self.compute_dtype), self)
        return output.to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Skeleton) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grad, ctx.layer.dequantized().to(grad.dtype)), None
