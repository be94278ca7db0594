"""Tied weights, which several layers share, often the embeddings and the output layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.errors import UserError


def tied_layers(model: nn.Module, name: str) -> list[str]:
    """Return names of all layers that share the weight of the layer `name`, including itself."""
    weight = model.get_submodule(name).weight
    return [n for n, m in model.named_modules() if m._parameters.get("weight") is weight]


def untie_all(model: nn.Module) -> None:
    """Give every module its own copy of tied weights.

    A file declared as untied must hold a tensor for each module.
    """
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                setattr(module, leaf, nn.Parameter(parameter.detach().clone()))
            seen.add(parameter)


def can_untie(config: Any) -> bool:
    """Return whether a stored config keeps `tie_word_embeddings=False`.

    The config of T5 sets it back to True.
    """
    stored = {**config.to_dict(), "tie_word_embeddings": False}
    return not type(config).from_dict(stored).tie_word_embeddings


def declare_untied(model: nn.Module, *, tied_before: int) -> None:
    """Untie all weights of a transformers model if a merge has untied some of them.

    Args:
        model: the merged model. Its config then declares no tied weights.
        tied_before: the number of tied pairs before the merge.

    Raises:
        UserError: the architecture cannot be stored with untied weights (T5).
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or tied_pairs(model) >= tied_before:
        return
    if not can_untie(config):
        raise UserError(
            f"{type(model).__name__} always ties its embeddings, so an adapter on one of them "
            "cannot be merged permanently. Use the adapter unmerged."
        )
    config.tie_word_embeddings = False
    untie_all(model)


def tied_pairs(model: nn.Module) -> int:
    """Return how many parameter names are second names of another parameter."""
    every = sum(1 for _ in model.named_parameters(remove_duplicate=False))
    return every - sum(1 for _ in model.named_parameters())
