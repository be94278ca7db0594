"""Checks that an adapter can act on its layers and that training reaches its tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import UserError

from .layers.base import Wrapper

MIXERS = frozenset(["falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"])
"""Model types for which PEFT 0.21 accepts no adapter on a mixer's `out_proj`."""
_PROJECTIONS = ("x_proj", "dt_proj", "out_proj")
"""Linear layers of state space mixers whose weights a kernel may read."""
BEHIND = "nn.MultiheadAttention reads its weight without calling it"
KERNELS = "kernels of state space models read their weights without calling them"
OTHERS = "text does not reach them, only images or sound do (lora.targets can name them)"


def read_behind(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return names of layers whose parent always reads their weight without calling them.

    A wrapper around such a layer has no effect.

    Args:
        modules: all modules of a model, by all their names.
    """
    return {
        f"{path}.{leaf}".removeprefix(".")
        for path, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for leaf, _ in module.named_children()
    }


def skip_reasons(model: nn.Module, heads: list[str]) -> dict[str, str]:
    """Return the names of modules that `all-linear` leaves out, with the reason.

    Training might not reach them. They are of two kinds:

    * layers of a state space mixer (Mamba and similar) whose class passes their weights to a kernel
    * everything outside the language model, in a model that also takes images or sound

    Args:
        model: the bare model.
        heads: its task heads (`head_modules`).
    """
    reasons: dict[str, str] = {}
    text = _language_model(model) if heads else None  # CLIP has two towers and no head
    inside = None if text is None else set(text.modules())
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and module not in inside:
            reasons[name] = OTHERS
        if "A_log" in module._parameters:
            reasons |= {f"{name}.{leaf}": KERNELS for leaf in _handed_over(module)}
    return reasons


def _handed_over(mixer: nn.Module) -> list[str]:
    try:
        source = inspect.getsource(type(mixer))
    except (OSError, TypeError):  # a class without a file
        source = ""
    names = [name for name in _PROJECTIONS if name in mixer._modules]
    return [n for n in names if not source or re.search(rf"self\.{n}\.weight\b", source)]


def _language_model(model: nn.Module) -> nn.Module | None:
    """Return the part for text in a transformers model that also takes other input."""
    config: Any = getattr(model, "config", None)
    get_text, get_decoder = (
        getattr(config, "get_text_config", None),
        getattr(model, "get_decoder", None),
    )
    if not callable(get_text) or not callable(get_decoder) or get_text() is config:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return None
    decoder = get_decoder()
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def check_mixers(model: nn.Module, names: list[str]) -> None:
    """Raise UserError for layers on which PEFT loads no adapter.

    Args:
        model: the bare model.
        names: names of the layers to adapt.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    out_proj = [name for name in names if name.rpartition(".")[2] == "out_proj"]
    if kind in MIXERS and out_proj:
        raise UserError(
            f"lora.targets: {out_proj[0]} of a {kind} cannot be adapted, since its kernels read "
            "the weight without calling the layer. Set lora.exclude=[out_proj]."
        )


def keep_off_fast_paths(model: nn.Module) -> list[Any]:
    """Make torch's encoder layers call their linear layers in evaluation too.

    Without gradients and hooks, nn.TransformerEncoderLayer passes all its weights to one kernel.
    That kernel ignores adapters. nn.TransformerEncoder packs padded rows for the kernel.

    Args:
        model: the model with the adapter in place.

    Returns:
        Handles whose `remove` restores the model.
    """
    handles: list[Any] = []
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if not any(isinstance(part, Wrapper) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            handles.append(module.register_forward_pre_hook(_nothing))
        elif getattr(module, "use_nested_tensor", False):
            handles.append(_Packing(module))
    return handles


def _nothing(*_: Any) -> None:
    """Do nothing. Only the presence of this hook matters."""


class _Packing:
    """A handle that keeps padded rows padded in an nn.TransformerEncoder until it is removed."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        self.encoder.use_nested_tensor = True


def without_gradient(
    trained: Mapping[str, Tensor], received: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """Return names of trainable tensors that no backward pass since the last step has reached.

    Tensors are of one kind if their names differ only in the last number. Examples are several
    experts, or layers that training drops at random.

    Args:
        trained: tensors by name, after a backward pass.
        received: names of the tensors that have received a gradient; None: those that hold one.

    Returns:
        Names in two lists. The first holds tensors without a reached tensor of their kind, so the
        model uses none of that kind. The second holds tensors with a reached one.
    """
    trainable = {name: tensor for name, tensor in trained.items() if tensor.requires_grad}
    if received is None:
        received = {name for name, tensor in trainable.items() if tensor.grad is not None}
    missing = [name for name in trainable if name not in received]
    reached = {_kind(name) for name in trainable if name in received}
    some = [name for name in missing if _kind(name) in reached]
    return [name for name in missing if _kind(name) not in reached], some


def _kind(name: str) -> str:
    """Return a name without its last number."""
    parts = name.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=None)
    return ".".join("*" if place == last else part for place, part in enumerate(parts))


def check_reached(
    trained: Mapping[str, Tensor], received: Collection[str] | None = None
) -> list[str]:
    """Check that a backward pass has reached every reachable tensor of an adapter.

    Args:
        trained: the adapter's tensors by name.
        received: names of the tensors that have received a gradient; None: those that hold one.

    Returns:
        Names of tensors that perhaps this batch alone has missed.

    Raises:
        UserError: the model does not use some tensors, or reads weights without calling the
            adapted layers.
    """
    never, some = without_gradient(trained, received)
    if never:
        raise UserError(
            f"{len(never)} of {len(trained)} trainable tensors, such as {never[0]}, get no "
            "gradient, since the model does not call their modules. Set "
            f"{_exclusion(never, [n for n in trained if n not in never])}."
        )
    return some


def check_frozen_base(model: nn.Module, stored: Iterable[Tensor]) -> None:
    """Raise UserError if a parameter outside of the adapter's `stored` tensors is trainable."""
    known = {id(tensor) for tensor in stored}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            module = name.replace(".base_layer", "").rpartition(".")[0]
            raise UserError(
                f"{name} of the frozen base is trainable, but no adapter stores it. Keep it frozen "
                f"in your callbacks, or set lora.modules_to_save=[{module}]."
            )


def _exclusion(never: list[str], others: list[str]) -> str:
    """Return a setting that excludes the modules of the `never` tensors and no others."""
    modules = [re.split(_OF_ADAPTER, name)[0] for name in never]
    reached = [re.split(_OF_ADAPTER, name)[0] for name in others]
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    if not {name.rpartition(".")[2] for name in reached}.intersection(leaves):
        return f"lora.exclude=[{','.join(leaves)}]"
    parts = zip(*(name.split(".") for name in modules), strict=False)
    shared = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
    if shared and not any(f"{name}.".startswith(f"{'.'.join(shared)}.") for name in reached):
        return f"'lora.exclude=\"{'.'.join(shared)}.*\"'"
    return f"lora.exclude=[{','.join(dict.fromkeys(modules))}]"


_OF_ADAPTER = r"\.(?:lora_|token_adapter\.|base_layer\.|weight$|bias$)"
"""Pattern for the point in a tensor's name where its module's name ends."""
