"""Base class of the LoRA layers, which call a frozen layer and add two trainable matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError
from lora_lightning.lora.casts import cast_frozen
from lora_lightning.lora.forward_pass import ForwardPass
from lora_lightning.lora.functional import add_low_rank, fused_linear, low_rank_norm
from lora_lightning.lora.initialization.svd import initial_matrices
from lora_lightning.lora.probe import is_plain, same_output
from lora_lightning.lora.products import joins_products
from lora_lightning.lora.rng import fill_by_cpu

from .base import Wrapper, dequantized


class LoraLayer(Wrapper):
    """Frozen layer with a low-rank update: h = W0 x + s B A x.

    Equation 3 of Hu et al. 2021 (arXiv:2106.09685), with s = alpha / r or alpha / sqrt(r). The
    base layer is called, never copied.

    If A and B start from parts of W0 (`svd.py`), the layer keeps their initial values A0 and B0. It
    then computes h = W0 x + s (B A - B0 A0) x. The papers get the same result by changing the base
    to W0 - s B0 A0. Here the base stays unchanged.

    Args:
        base_layer: the layer to adapt. Its parameters stay unchanged.
        rank: r.
        scaling: s.
        dropout: probability of dropping an input of A during training. 0.0 by default.
        init: initial values of A and B, see `LoraConfig.init`. "kaiming" by default.
        freeze_A: whether to train only B (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
            False by default.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    first_A: Tensor | None
    first_B: Tensor | None
    random_matrix = "lora_A"
    """The randomly initialized matrix. The other starts at zero."""
    add_update: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = staticmethod(
        add_low_rank
    )
    """Adds the update to the output of a base layer that must be called."""
    adds_product = False
    """Whether the update is the product of A, B and the input, before any dropout."""
    fused = True
    """Whether to compute a plain base layer together with the update instead of calling it."""
    forward_pass: ForwardPass | None = None
    """State that the adapter's layers share, or None without an adapter around this layer."""

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        *,
        scaling: float,
        dropout: float = 0.0,
        init: str = "kaiming",
        freeze_A: bool = False,
    ) -> None:
        super().__init__(base_layer)
        self.rank = rank
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        of_A, of_B = self._shapes()
        device = _device_of(base_layer)
        # Always fp32: torch's default may be the base's dtype, and 16 bits round away updates.
        self.lora_A = nn.Parameter(torch.empty(of_A, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(of_B, device=device, dtype=torch.float32))
        self.register_buffer("first_A", None)
        self.register_buffer("first_B", None)
        self.reset_parameters(init)
        getattr(self, self.random_matrix).requires_grad_(not freeze_A)
        self.train(base_layer.training)

    def features(self) -> tuple[int, int]:
        """Return the numbers of inputs and outputs of the adapted weight."""
        base = self.base_layer
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B."""
        fan_in, fan_out = self.features()
        return (self.rank, fan_in), (fan_out, self.rank)

    def reset_parameters(self, init: str = "kaiming") -> None:
        """Set A and B to their initial values, so that the layer equals its base.

        Raises:
            UserError: `init` takes them from the base weight, which is too small for the rank.
        """
        if init == "gaussian":
            fill_by_cpu(self.lora_A, nn.init.normal_, std=1.0 / self.rank)
        elif init == "kaiming":
            fill_by_cpu(self.lora_A, nn.init.kaiming_uniform_, a=math.sqrt(5))
        else:
            a, b = initial_matrices(init, self.dense_weight(), self.rank, scaling=self.scaling)
            with torch.no_grad():
                self.lora_A.copy_(a)
                self.lora_B.copy_(b)
            self.first_A, self.first_B = a, b
            return
        nn.init.zeros_(self.lora_B)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (r, in) and (out, r) matrices whose product is the whole update.

        With A0 and B0 they are [A; A0] and [B, -B0].
        """
        if self.first_A is None or self.first_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.first_A]), torch.cat([self.lora_B, -self.first_B], 1)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, under the names of PEFT's files if these have them."""
        tensors = self._in_file(self.lora_A, self.lora_B)
        if self.first_A is not None and self.first_B is not None:
            tensors |= {"first_A": self.first_A, "first_B": self.first_B}
        return tensors

    def exported_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the same layer as plain LoRA, under the names of PEFT's files."""
        return self._in_file(*self.matrices())

    def _in_file(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}

    @property
    def stored_rank(self) -> int:
        """The rank of the same layer as plain LoRA."""
        return self.matrices()[0].shape[0]

    def lora_B_from_file(self, stored: Tensor) -> Tensor:
        """Return the `lora_B` that corresponds to `stored`, the B of a plain LoRA file.

        Raises:
            UserError: this layer cannot represent `stored`.
        """
        return stored

    def dense_weight(self) -> Tensor:
        """Return the frozen weight as (out, in), dequantized if the layer is quantized."""
        if self._pristine_weight:
            return self._relayout(self._pristine_weight[0].detach())
        return self._relayout(dequantized(self.base_layer))

    def _relayout(self, matrix: Tensor) -> Tensor:
        """Convert between (out, in) and the layout of the base weight, in either direction.

        Raises:
            UserError: the layout is unknown.
        """
        return matrix

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.enabled or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        bare = not (args or kwargs)
        shared = None if torch.compiler.is_compiling() else self.forward_pass
        flight = None
        if bare and shared is not None and joins_products(x.device):
            together = shared.output(self, x)
            if together is not None:
                return together
            flight = shared.flight()
        frozen = self.frozen(x) if bare else None
        if frozen is None:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return self.add_update(output, self.dropout(x), *self.matrices(), self.scaling)
        weight, bias, dtype = frozen
        lora_A, lora_B = self.matrices()
        copies = None
        if shared is not None and not lora_A.dtype == lora_B.dtype == dtype:
            copies = shared.casts.cast(lora_A, dtype), shared.casts.cast(lora_B, dtype)
        return fused_linear(
            x.to(dtype),
            cast_frozen(weight, dtype),
            None if bias is None else bias.to(dtype),
            lora_A,
            lora_B,
            scaling=self.scaling,
            dropout=self.active_dropout(),
            copies=copies,
            flight=flight,
        )

    def frozen(self, x: Tensor) -> tuple[Tensor, Tensor | None, torch.dtype] | None:
        """Return the base layer's weight (out, in) and bias, and the dtype of its products with x.

        The result is None if the layer must be called.
        """
        weight = self.plain_weight() if self.fused else None
        if weight is None:
            return None
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        if torch.is_autocast_enabled(x.device.type):
            return weight, bias, torch.get_autocast_dtype(x.device.type)
        return (weight, bias, x.dtype) if weight.dtype == x.dtype else None

    def only_adds(self) -> bool:
        """Return whether the layer adds exactly the product of A, B and its whole input."""
        plain = self.adds_product and self.first_A is None
        return plain and self.enabled and not self.merged and self.active_dropout() == 0.0

    def plain_weight(self) -> Tensor | None:
        """Return the frozen weight as (out, in) if the base layer only multiplies by it.

        The result is None if the layer must be called. Such a layer is quantized, sharded, hooked,
        partly trainable (its bias), or of another class.
        """
        return None

    def active_dropout(self) -> float:
        training = self.training and isinstance(self.dropout, nn.Dropout)
        return self.dropout.p if training else 0.0  # type: ignore[return-value]

    def update(self) -> Tensor:
        """Return the update s B A as (out, in)."""
        lora_A, lora_B = self.matrices()
        return (lora_B.detach() @ lora_A.detach()) * self.scaling

    def delta_weight(self) -> Tensor:
        """Return the update in the layout of the base weight."""
        return self._relayout(self.update())

    def update_norm(self) -> Tensor:
        """Return the Frobenius norm of the update, a scalar."""
        return low_rank_norm(*self.matrices(), self.scaling)

    def merge(self) -> None:
        """Replace W0 by W0 + s B A, summed in fp32 and rounded once.

        W0 itself stays untouched, so `unmerge` is exact after any number of merges. A tensor tied
        to W0 elsewhere in the model keeps its value.

        Raises:
            UserError: the base weight is quantized, the sum is not finite, or the base layer does
                more with its weight than multiply by it.
        """
        if self.merged:
            return
        module, name = self.adapted
        weight = getattr(module, name)
        plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor
        if not plain or not weight.is_floating_point():
            raise UserError(
                f"cannot merge into {type(module).__name__}: its weight is quantized. "
                "Load the unquantized base model and merge there."
            )
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = (weight.detach().to(wide) + self.delta_weight().to(wide)).to(weight.dtype)
        if not merged.is_meta and not torch.isfinite(merged).all():
            raise UserError("the merged weight is not finite: the adapter has diverged.")
        proven = is_plain(module) or self._merges_exactly(weight, merged)
        if not proven or getattr(module, "max_norm", None) is not None:  # it scales the rows
            raise UserError(
                f"cannot merge into {type(module).__name__}: with the merged weight it gives other "
                "outputs than with the adapter. Use the adapter unmerged."
            )
        self.replace_weight(nn.Parameter(merged, requires_grad=False))

    def _merges_exactly(self, weight: Tensor, merged: Tensor) -> bool:
        """Return whether the base layer with the merged weight gives what this layer gives now."""

        def with_merged(x: Tensor) -> Any:
            return torch.func.functional_call(self.base_layer, {"weight": merged}, (x,))

        return same_output(self, with_merged, weight, self._input_width())

    def _input_width(self) -> int:
        """Return the width of the inputs, or 0 for token ids."""
        return self.features()[0]

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


def _device_of(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
