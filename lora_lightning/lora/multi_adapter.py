"""Several adapters on one frozen base, selected by name for a whole batch or for each row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError, did_you_mean

from .batched import Stack, stacked_model
from .embeddings import rows_needed, vocabulary_rows
from .model import Adapter
from .running_statistics import is_statistic
from .serialization.load import adapter_from, read_adapter, whole_modules
from .serialization.peft_config import from_peft_config, ties_updates


class AdapterSet:
    """Adapters that share the weights of one unchanged base model.

    Each adapter has its own model, which shares all frozen tensors with the base. An additional
    adapter costs only its own matrices. Adding, replacing or removing an adapter does not affect
    the others.

    Args:
        model: the base. It is frozen and put in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base = model.requires_grad_(False).eval()
        self.adapters: dict[str, Adapter] = {}
        self._stack = Stack()
        self._stacked: nn.Module | None = None

    def add(self, name: str, folder: str | Path) -> nn.Module:
        """Load an adapter, replace any adapter of the same name and return the new model.

        Raises:
            UserError: see `load_adapter`. The previous adapter then stays in place.
        """
        raw, tensors = read_adapter(folder)
        config = from_peft_config(raw)
        rows = rows_needed(config, tensors)
        if rows and rows > vocabulary_rows(self.base):
            raise UserError(
                f"adapter {folder} requires {rows} vocabulary rows, but the shared base has "
                f"{vocabulary_rows(self.base)}. Grow it before sharing: "
                f"lora_lightning.lora.grow(model, {rows})."
            )
        names = whole_modules(self.base, config.modules_to_save, tensors)
        unshared = tuple(f"{name}." for name in names)
        shared = {
            id(tensor): tensor
            for leaf, tensor in (*self.base.named_parameters(), *self.base.named_buffers())
            if not leaf.startswith(unshared)
            and (config.bias == "none" or not leaf.endswith("bias"))
            if not is_statistic(leaf)
        }
        model = copy.deepcopy(self.base, shared)
        model.rows_before_growth = None  # type: ignore[assignment]  # shared tensors do not change
        self.adapters[name] = adapter_from(
            model, config, tensors, folder, together=ties_updates(raw)
        )
        model.eval()  # requires_grad stays, since `stacked_model` finds a slot's layers by it
        self._stacked = None
        return model

    def remove(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            UserError: no adapter has the name.
        """
        self[name]
        del self.adapters[name]
        self._stacked = None

    def __getitem__(self, name: str | None) -> nn.Module:
        """Return the base with the named adapter, or the base alone for None.

        Raises:
            UserError: no adapter has the name.
        """
        if name is None:
            return self.base
        if name not in self.adapters:
            known = sorted(self.adapters)
            raise UserError(
                f"adapter {name!r} not found.{did_you_mean(name, known)} "
                f"Loaded adapters: {', '.join(known) or 'none'}."
            )
        return self.adapters[name].model

    def forward(self, names: Sequence[str | None], **inputs: Any) -> Any:
        """Return the base's output for a batch with a named adapter for each row.

        In this single pass the frozen layers process all rows together.

        Args:
            names: an adapter name for each row, or None for no adapter.
            inputs: the model's arguments. Tensors with as many rows as names are handled by row.

        Raises:
            UserError: a name is unknown, the numbers of names and rows differ, or a layer of the
                model mixes rows.
        """
        return self._by_rows(
            names, inputs, lambda model, arguments: model(**arguments, use_cache=False)
        )

    __call__ = forward

    def generate(self, names: Sequence[str | None], **inputs: Any) -> Tensor:
        """Call the base's `generate` for a batch with a named adapter for each row.

        Returns:
            Token ids, (rows, length). With num_return_sequences the sequences of a row are
            adjacent.
        """
        output: Tensor = self._by_rows(
            names, inputs, lambda model, arguments: model.generate(**arguments)
        )
        return output

    @torch.no_grad()
    def _by_rows(self, names: Sequence[str | None], inputs: dict[str, Any], call: Any) -> Any:
        known: list[str | None] = [None, *self.adapters]
        for name in names:
            self[name]
        rows = {
            len(arguments)
            for arguments in inputs.values()
            if isinstance(arguments, Tensor)
            if arguments.dim()
        }
        if len(names) not in rows:
            raise UserError(
                f"{len(names)} adapter names for {max(rows, default=0)} rows: must be one per row."
            )
        slots = [known.index(name) for name in names]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        groups = [(slot, len(list(rows))) for slot, rows in groupby(sorted(slots))]
        if self._stacked is None:
            models = {slot: self[name] for slot, name in enumerate(known)}
            self._stacked = stacked_model(models, self._stack)
        arguments = _reordered(inputs, torch.tensor(order), len(order))
        with self._stack.of([slot for slot, _ in groups], [count for _, count in groups]):
            output = call(self._stacked, arguments)
        return _reordered(output, torch.tensor(order).argsort(), len(order))


def _reordered(values: Any, order: Tensor, rows: int) -> Any:
    """Return tensors with their rows in another order, and other values unchanged.

    A tensor may have `rows` rows or a multiple.
    """
    if isinstance(values, Tensor) and values.dim() > 0 and values.shape[0] % rows == 0:
        each = values.shape[0] // rows
        index = (order[:, None] * each + torch.arange(each)).flatten()
        return values[index.to(values.device)]
    if isinstance(values, dict):
        changed = {key: _reordered(value, order, rows) for key, value in values.items()}
        return type(values)(**changed) if type(values) is not dict else changed
    if isinstance(values, tuple):
        return tuple(_reordered(value, order, rows) for value in values)
    return values
