"""Parameters that several layers of a model share, as embeddings and output layer often do."""

from __future__ import annotations

from typing import Any

from torch import nn


def tied_layers(model: nn.Module, name: str) -> list[str]:
    """Names of all layers whose weight is the very one of the layer called `name`, it included."""
    weight = model.get_submodule(name).weight
    return [n for n, m in model.named_modules() if m._parameters.get("weight") is weight]


def untie_all(model: nn.Module) -> None:
    """Gives every module its own copy: a file said to be untied must hold a tensor for each."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                setattr(module, leaf, nn.Parameter(parameter.detach().clone()))
            seen.add(parameter)


def can_untie(config: Any) -> bool:
    """Whether a stored config keeps `tie_word_embeddings=False`; T5's sets it back to True."""
    stored = {**config.to_dict(), "tie_word_embeddings": False}
    return not type(config).from_dict(stored).tie_word_embeddings


def tied_pairs(model: nn.Module) -> int:
    """How many parameter names are second names of another parameter."""
    every = sum(1 for _ in model.named_parameters(remove_duplicate=False))
    return every - sum(1 for _ in model.named_parameters())
