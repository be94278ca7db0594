"""Trainable rows of a frozen vocabulary, for a few tokens such as newly added ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.errors import UserError, did_you_mean
from lora_lightning.lora.config import LoraConfig
from lora_lightning.lora.name_patterns import ends_with
from lora_lightning.lora.tied_weights import tied_layers

from .base import Wrapper

ROWS = "token_adapter.trainable_tokens_delta"
"""Name of the trainable rows in PEFT's files. Despite its name it holds the rows themselves."""
MATRIX = "token_adapter.base_layer.weight"
"""Name of the frozen matrix, which PEFT stores if the vocabulary has grown."""


class TokenRows(Wrapper):
    """Frozen embedding or output layer that replaces some rows of its matrix W by trainable rows.

    An embedding gives the trainable row of an adapted token, and the row of W for any other token.
    In a linear layer, output i is the trainable row times x, plus its bias. The layer makes no copy
    of W, and W gets no gradient. Training therefore costs only the trainable rows.

    Args:
        base_layer: an nn.Embedding, (vocabulary, dim), or nn.Linear, (dim -> vocabulary).
        indices: the tokens, each once.
        tied_to: the layer with the same W, whose trainable rows this layer shares. None by default.
    """

    base_layer: nn.Embedding | nn.Linear
    indices: Tensor
    _sorted: Tensor
    _order: Tensor
    token_adapter: nn.ParameterDict

    def __init__(
        self,
        base_layer: nn.Embedding | nn.Linear,
        indices: Sequence[int],
        *,
        tied_to: TokenRows | None = None,
    ) -> None:
        super().__init__(base_layer)
        weight = base_layer.weight
        tokens = torch.tensor(indices, device=weight.device)
        # Sorted by index, so that bisection finds a token.
        self.register_buffer("indices", tokens, persistent=False)
        self.register_buffer("_sorted", tokens.sort().values, persistent=False)
        self.register_buffer("_order", tokens.argsort(), persistent=False)
        # In a tuple, so that nn.Module does not register it a second time.
        self._tied_to = None if tied_to is None else (tied_to,)
        self.token_adapter = tied_to.token_adapter if tied_to is not None else self._rows_of(weight)
        self.train(base_layer.training)

    def _rows_of(self, weight: Tensor) -> nn.ParameterDict:
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = nn.Parameter(weight.detach()[self.indices].to(wide))
        return nn.ParameterDict({ROWS.rpartition(".")[2]: rows})

    @property
    def rows(self) -> nn.Parameter:
        """The trainable rows, (tokens, dim), in the order of `indices`."""
        rows: nn.Parameter = self.token_adapter[ROWS.rpartition(".")[2]]
        return rows

    @torch.no_grad()
    def start_at_mean(self) -> None:
        """Set all trainable rows to the mean of the rows before them.

        This is for tokens without a meaning.
        """
        known = self.base_layer.weight[: int(self.indices.min())]
        self.rows.copy_(known.mean(0, dtype=self.rows.dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.enabled or self.merged:
            return output
        if isinstance(self.base_layer, nn.Embedding):
            return self._embedded(x, output)
        bias = None if self.base_layer.bias is None else self.base_layer.bias[self.indices]
        outputs = F.linear(x, self.rows.to(x.dtype), bias)
        # In place: a linear layer does not need its output again, and logits are large.
        return output.index_copy_(-1, self.indices, outputs.to(output.dtype))

    def _embedded(self, tokens: Tensor, output: Tensor) -> Tensor:
        place = torch.searchsorted(self._sorted, tokens).clamp(max=len(self._sorted) - 1)
        is_trained = self._sorted[place] == tokens
        rows = F.embedding(self._order[place], self.rows.to(output.dtype))
        # Some models scale inside the embedding (Gemma 3, BART).
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(is_trained[..., None], rows, output)

    def merge(self) -> None:
        """Replace W by a copy with the trained rows, and keep W untouched.

        Raises:
            UserError: a trained row is not finite.
        """
        if self.merged:
            return
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        if self._tied_to is not None:
            merged: Any = self._tied_to[0].base_layer.weight
        else:
            if not self.rows.isfinite().all():
                raise UserError("a trained row is not finite: the training has diverged.")
            filled = weight.detach().clone()
            filled[self.indices] = self.rows.detach().to(weight.dtype)
            merged = nn.Parameter(filled, requires_grad=False)
        self.replace_weight(merged)


@dataclass(frozen=True)
class RowsMatch:
    """Layer with trainable rows, and the tied layers that share them."""

    name: str
    indices: list[int]
    tied: list[str]


def match_rows(model: nn.Module, config: LoraConfig) -> list[RowsMatch]:
    """Return the layers that `config.trainable_token_indices` names, by PEFT's rules.

    A list of indices applies to the input embedding. Tied layers share its rows.

    Raises:
        UserError: a name matches no module or a module without rows, an index exceeds the rows, or
            tied layers have different indices.
    """
    by_name = config.trainable_token_indices
    if by_name is None:
        return []
    where = "lora.trainable_token_indices"
    source = _input_embedding(model)
    if isinstance(by_name, list):
        if source is None:
            raise UserError(f"{where}: a {type(model).__name__} requires the name of a layer.")
        by_name = {source: by_name}
    wanted: dict[str, list[int]] = {}
    modules = dict(model.named_modules())
    for pattern, indices in by_name.items():
        names = [name for name, m in modules.items() if ends_with(name, pattern)]
        known = [n for n, m in modules.items() if isinstance(m, (nn.Embedding, nn.Linear))]
        if not names:
            hint = did_you_mean(pattern, {name.rpartition(".")[2] for name in known})
            raise UserError(f"{where}: {pattern!r} matches no module.{hint}")
        for name in names:
            if name not in known:
                raise UserError(f"{where}: {name}, a {type(modules[name]).__name__}, has no rows.")
            rows = modules[name].weight.shape[0]
            if max(indices) >= rows:
                raise UserError(
                    f"{where}: index {max(indices)} is not in {name}, which has {rows} rows."
                )
            if wanted.setdefault(name, indices) != indices:
                raise UserError(f"{where}: two entries for {name} have different indices.")
    return _grouped(model, wanted, source)


def check_rows(
    model: nn.Module, rows: list[RowsMatch], adapted: set[str], saved: list[str], bias: str
) -> None:
    """Raise UserError for trained rows of layers that the adapter trains in another way too.

    Args:
        model: the bare model.
        rows: the layers with trained rows.
        adapted: all names of the layers that LoRA wraps.
        saved: names of the modules that are trained whole.
        bias: which biases are trained, see `LoraConfig.bias`.
    """
    for name in (name for match in rows for name in (match.name, *match.tied)):
        if name in adapted or name in saved:
            option = "targets" if name in adapted else "modules_to_save"
            raise UserError(f"lora.{option}: not supported on {name}, whose rows are trained.")
        if bias == "all" and getattr(model.get_submodule(name), "bias", None) is not None:
            raise UserError(f"lora.bias=all: not supported on {name}, whose rows are trained.")


def _grouped(model: nn.Module, wanted: dict[str, list[int]], source: str | None) -> list[RowsMatch]:
    """Return one match per matrix, named after the input embedding if it is included."""
    matches: list[RowsMatch] = []
    for name, indices in sorted(wanted.items(), key=lambda item: item[0] != source):
        if any(name in match.tied for match in matches):
            continue
        others = [other for other in tied_layers(model, name) if other != name]
        unlike = [o for o in others if wanted.get(o, indices if name == source else []) != indices]
        if unlike:
            raise UserError(
                f"lora.trainable_token_indices: {name} and {unlike[0]} share one matrix and its "
                f"rows. Set the indices of the input embedding {source} alone."
            )
        matches.append(RowsMatch(name, indices, others))
    return matches


def rows_of_tokens(model: nn.Module, indices: list[int]) -> dict[str, list[int]]:
    """Return `trainable_token_indices` for tokens in the input embedding and the output layer."""
    source, output = _input_embedding(model), _name_of(model, "get_output_embeddings")
    assert source is not None
    names = [source]
    if output is not None and output not in tied_layers(model, source):
        names.append(output)
    return dict.fromkeys(names, indices)


def _input_embedding(model: nn.Module) -> str | None:
    return _name_of(model, "get_input_embeddings")


def _name_of(model: nn.Module, getter: str) -> str | None:
    get = getattr(model, getter, None)
    module = get() if callable(get) else None
    return next((name for name, m in model.named_modules() if m is module), None)
