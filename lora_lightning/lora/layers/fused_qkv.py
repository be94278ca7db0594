"""LoRA on parts of a fused layer, as on separate layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .fused_parts import Part
from .linear import LoraConv1D, LoraLinear
from .lora_layer import LoraLayer


class SplitLayer(LoraLayer):
    """Fused layer with one A and one B per adapted part: h_p = W_p x + s B_p A_p x.

    This is loralib's MergedLinear (Hu et al. 2021). For k adapted parts it equals LoRA of rank k r
    on the whole layer, where B has blocks on its diagonal and zeros elsewhere. Only the blocks are
    parameters, so no optimizer can change the zeros.

    `lora_A` is (k r, in), with the parts stacked. `lora_B` is (outputs of adapted parts, r),
    stacked the same way. Files hold the whole matrices, with B as (out, k r).

    Args:
        base_layer: the layer to adapt.
        rank: r, of each part.
        parts: all parts of the layer in their order, with sizes.
        settings: settings of `LoraLayer`.
    """

    adds_product = False

    def __init__(
        self, base_layer: nn.Module, rank: int, *, parts: tuple[Part, ...], **settings: Any
    ) -> None:
        self.parts = parts  # first, since the shapes of A and B depend on them
        super().__init__(base_layer, rank, **settings)

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        fan_in, _ = self.features()
        sizes = [part.size or 0 for part in self.parts if part.adapted]
        return (len(sizes) * self.rank, fan_in), (sum(sizes), self.rank)

    def matrices(self) -> tuple[Tensor, Tensor]:
        blocks = iter(self.lora_B.split([part.size or 0 for part in self.parts if part.adapted]))
        diagonal = [
            next(blocks) if part.adapted else self.lora_B.new_empty(part.size or 0, 0)
            for part in self.parts
        ]
        return self.lora_A, torch.block_diag(*diagonal)

    def lora_B_from_file(self, stored: Tensor) -> Tensor:
        _, dense = self.matrices()
        if stored.shape != dense.shape:
            raise UserError(
                f"B is {tuple(stored.shape)}, must be {tuple(dense.shape)} for these parts."
            )
        blocks, row, column = [], 0, 0
        for part in self.parts:
            end = row + (part.size or 0)
            if part.adapted:
                blocks.append(stored[row:end, column : column + self.rank])
                column += self.rank
            row = end
        if sum(int(block.count_nonzero()) for block in blocks) < int(stored.count_nonzero()):
            raise UserError("B must be zero outside of these parts. It was trained as a whole.")
        return torch.cat(blocks)


class SplitLinear(SplitLayer, LoraLinear):
    """Parts of an nn.Linear or a quantized linear layer."""


class SplitConv1D(SplitLayer, LoraConv1D):
    """Parts of transformers' Conv1D (GPT-2's c_attn)."""
