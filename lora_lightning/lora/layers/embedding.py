"""LoRA on an embedding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.lora.functional import add_low_rank_embedding
from lora_lightning.lora.probe import returns_rows
from lora_lightning.lora.rng import fill_by_cpu

from .lora_layer import LoraLayer


class LoraEmbedding(LoraLayer):
    """LoRA on nn.Embedding: A is (r, vocabulary), B is (dim, r).

    As in PEFT and loralib, A starts at zero and B is drawn from N(0, 1). Only one token reads each
    column of A, so a random A would be noise that other tokens never average out.
    """

    random_matrix = "lora_B"

    def __init__(self, base_layer: nn.Module, rank: int, **settings: Any) -> None:
        if not returns_rows(base_layer):  # type: ignore[arg-type]
            raise UserError(
                f"a {type(base_layer).__name__} does not return the requested rows of its weight, "
                "which LoRA requires. Add it to lora.exclude."
            )
        super().__init__(base_layer, rank, **settings)

    def features(self) -> tuple[int, int]:
        base = self.base_layer
        return int(base.num_embeddings), int(base.embedding_dim)  # type: ignore[arg-type]

    def reset_parameters(self, init: str = "kaiming") -> None:
        if init not in ("kaiming", "gaussian"):
            raise UserError(
                f"lora.init={init}: not supported with an embedding among lora.targets. Set "
                "lora.init=kaiming, or lora.targets without it."
            )
        nn.init.zeros_(self.lora_A)
        fill_by_cpu(self.lora_B, nn.init.normal_)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.enabled or self.merged:
            return output
        scaling: float | Tensor = self.scaling
        # Some models scale inside the embedding (Gemma 3, BART), so the update is scaled too.
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            scaling = self.scaling * scale
        return add_low_rank_embedding(output, x, self.lora_A, self.lora_B, scaling)

    def _input_width(self) -> int:
        return 0

    def _in_file(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}

    def _relayout(self, matrix: Tensor) -> Tensor:
        return matrix.t()
