"""LoRA on a parameter itself, such as one tensor with the weights of all experts of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lightning.lora.functional import low_rank_norm

from .lora_layer import LoraLayer


class LoraParameter(LoraLayer):
    """Parameter W with a low-rank update: W_e + s B_e A_e for each expert e.

    W is a matrix (one expert), (E, out, in), or (E, in, out) if its module sets `is_transposed`.
    Only the module knows how it uses W, so each call runs the module with the sum instead of W.
    Dropout is impossible, because no input of A exists. The sum has the dtype of W. In 16 bits it
    rounds off updates that are small beside W, as in PEFT. Autograd keeps the sum, which is as
    large as W, until the backward pass.

    The matrices have the layout of PEFT's files. A is (E r, in), with the experts stacked. B is
    (out, r E), where the expert index varies fastest along the columns. Nested layers adapt several
    parameters of a module, the first one innermost.

    Args:
        base_layer: the module, or the layer of another of its parameters.
        rank: r.
        parameter: the parameter's name in the module.
        settings: settings of `LoraLayer`.
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, *, parameter: str, **settings: Any
    ) -> None:
        self.parameter = parameter  # first, since the shapes of A and B depend on it
        super().__init__(base_layer, rank, **settings)

    @property
    def adapted(self) -> tuple[nn.Module, str]:
        module = self.base_layer
        while isinstance(module, LoraParameter):
            module = module.base_layer
        return module, self.parameter

    @property
    def experts(self) -> int:
        """E, or 1 for a matrix."""
        weight = getattr(*self.adapted)
        return int(weight.shape[0]) if weight.dim() == 3 else 1

    def features(self) -> tuple[int, int]:
        rows, columns = getattr(*self.adapted).shape[-2:]
        return (rows, columns) if self._transposed() else (columns, rows)

    def _transposed(self) -> bool:
        module, name = self.adapted
        return getattr(module, name).dim() == 3 and getattr(module, "is_transposed", False)

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        fan_in, fan_out = self.features()
        width = self.rank * self.experts
        return (width, fan_in), (fan_out, width)

    @property
    def stored_rank(self) -> int:
        return self.rank

    def _by_expert(self) -> tuple[Tensor, Tensor]:
        """Return A as (E, r, in) and B as (E, out, r)."""
        fan_in, fan_out = self.features()
        a = self.lora_A.view(self.experts, self.rank, fan_in)
        return a, self.lora_B.view(fan_out, self.rank, self.experts).permute(2, 0, 1)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return two batches of matrices.

        Their products times s are the update in the layout of W.
        """
        a, b = self._by_expert()
        return (a.mT, b.mT) if self._transposed() else (b, a)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled or self.merged:
            return self.base_layer(*args, **kwargs)
        depth, inner = "", self.base_layer
        while isinstance(inner, LoraParameter):
            depth, inner = f"{depth}base_layer.", inner.base_layer
        weights = {f"{depth}{self.parameter}": self.adapted_weight()}
        return functional_call(self.base_layer, weights, args, kwargs)

    def adapted_weight(self) -> Tensor:
        """Return W + s B A, in W's shape and dtype.

        One product computes the sum, without a separate tensor for the update.
        """
        weight: Tensor = getattr(*self.adapted)
        left, right = (factor.to(weight.dtype) for factor in self._factors())
        stacked = weight.view(self.experts, *weight.shape[-2:])
        with torch.autocast(weight.device.type, enabled=False):  # it would change the dtype
            return torch.baddbmm(stacked, left, right, alpha=self.scaling).view_as(weight)

    def _merges_exactly(self, weight: Tensor, merged: Tensor) -> bool:
        return True  # the module is called with the sum itself

    def update(self) -> Tensor:
        left, right = self._factors()
        product = torch.bmm(left.detach(), right.detach()) * self.scaling
        return product.view_as(getattr(*self.adapted))

    def update_norm(self) -> Tensor:
        return low_rank_norm(*self._by_expert(), self.scaling)
