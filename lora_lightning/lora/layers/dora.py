"""DoRA: a weight decomposed into magnitude and direction, with LoRA on the direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .embedding import LoraEmbedding
from .linear import LoraConv1D, LoraLinear
from .lora_layer import LoraLayer


class DoraLayer(LoraLayer):
    """DoRA layer: h = m / |W0 + s B A| * (W0 + s B A) x + bias, with trainable m per output.

    Equation 5 of Liu et al. 2024 (arXiv:2402.09353). The magnitude m starts as |W0|, the norm of
    the weights of each output, so the layer initially equals its base. The backward pass treats
    the norm as a constant (section 4.3). The norm needs no (out, in) matrix of its own. By rows,
    |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, at the cost of r more tokens.
    Dropout applies only to the input of A.
    """

    adds_product = False
    lora_magnitude_vector: nn.Parameter
    _weight_squares: Tensor

    def __init__(self, base_layer: nn.Module, rank: int, **settings: Any) -> None:
        super().__init__(base_layer, rank, **settings)
        weight = self.dense_weight()
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        self.register_buffer("_weight_squares", squares, persistent=False)
        self._norm: tuple[tuple[Any, ...], Tensor] | None = None
        self.lora_magnitude_vector = nn.Parameter(self.weight_norm().clone())

    def weight_norm(self) -> Tensor:
        """Return |W0 + s B A| per output, (out), in fp32.

        Evaluation mode caches the norm while A and B are unchanged.
        """
        keeps = not (self.training or torch.compiler.is_compiling())  # graphs have no versions
        key = None
        if keeps:
            key = tuple((m._version, m.device, m.dtype) for m in (self.lora_A, self.lora_B))
            if self._norm is not None and self._norm[0] == key:
                return self._norm[1]
        # Leave inference mode: autograd cannot save its tensors for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            norm = self._new_norm()
        self._norm = None if key is None else (key, norm)
        return norm

    def _new_norm(self) -> Tensor:
        lora_A, lora_B = (matrix.float() for matrix in self.matrices())
        weight = self.dense_weight()
        cross = ((weight @ lora_A.t().to(weight.dtype)).float() * lora_B).sum(1)
        gram = (lora_B @ (lora_A @ lora_A.t()) * lora_B).sum(1)
        squares = self._weight_squares + 2 * self.scaling * cross + self.scaling**2 * gram
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def factor(self) -> Tensor:
        """Return the factor of the outputs, m / |W0 + s B A|, (out)."""
        return self.lora_magnitude_vector / self.weight_norm()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(x, *args, **kwargs)
        if not self.enabled or self.merged:
            return output
        factor = self.factor().to(output.dtype)
        bias = getattr(self.base_layer, "bias", None)
        scaled = output * factor
        return scaled if bias is None else scaled + bias.to(output.dtype) * (1 - factor)

    def update(self) -> Tensor:
        weight = self.dense_weight().float()
        return self.factor().detach()[:, None] * (weight + super().update()) - weight

    def update_norm(self) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(self.update())
        return norm

    def named_tensors(self) -> dict[str, Tensor]:
        return {**super().named_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def exported_tensors(self) -> dict[str, Tensor]:
        return {**super().exported_tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}


class DoraLinear(DoraLayer, LoraLinear):
    """DoRA on nn.Linear; m is (out)."""


class DoraConv1D(DoraLayer, LoraConv1D):
    """DoRA on transformers' Conv1D; m is (out)."""


class DoraEmbedding(DoraLayer, LoraEmbedding):
    """DoRA on nn.Embedding; m is (dim), as in PEFT.

    An output is a column of the table.
    """
