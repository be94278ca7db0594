"""Tensors of the base that an adapter trains or stores besides its own matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .running_statistics import running_statistics

LOW_PRECISION = (torch.float16, torch.bfloat16)


class BaseTensors:
    """Modules trained whole, trained biases and running statistics of a model.

    The constructor makes modules and biases trainable in fp32 and keeps their initial values.

    Args:
        model: the model with an adapter's layers in place, and nothing else trainable.
        modules: names of the modules to train whole.
        bias: which biases to train, see `LoraConfig.bias`.
    """

    def __init__(self, model: nn.Module, modules: list[str], bias: str) -> None:
        self.model = model
        self.modules = modules
        self.initial: dict[str, Tensor] = {}
        """Initial values by name."""
        self.untied: dict[str, nn.Parameter] = {}
        """Parameters that a module trained whole shared with the rest of the model, by name."""
        self._hooks: list[Any] = []
        for name in modules:
            self._train_module(name, model.get_submodule(name))
        for name, statistic in running_statistics(model).items():
            self.initial.setdefault(name, statistic.clone())
        for name, parameter in model.named_parameters():
            if name in self.initial or name.rpartition(".")[2] != "bias":
                continue
            of_layer = name.endswith(".base_layer.bias")
            if bias == "all" or (bias == "lora_only" and of_layer):
                self.initial[name] = parameter.detach().clone()
                parameter.requires_grad_(True)

    def _train_module(self, name: str, module: nn.Module) -> None:
        self._untie(name, module)
        for leaf, tensor in module.state_dict(keep_vars=True).items():
            self.initial[f"{name}.{leaf}"] = tensor.detach().clone()
        low = [p.dtype for p in module.parameters() if p.dtype in LOW_PRECISION]
        if low:
            _widen(module)
            self._hooks += _cast_around(module, low[0])
        module.requires_grad_(True)

    def _untie(self, name: str, module: nn.Module) -> None:
        """Give `module` its own parameters where the rest of the model shares them.

        A head tied to the embeddings is trained alone, as in PEFT. The embeddings stay frozen.
        """
        inside = set(module.modules())
        shared = {
            parameter
            for other in self.model.modules()
            if other not in inside
            for parameter in other.parameters(recurse=False)
        }
        for leaf, parameter in list(module.named_parameters()):
            if parameter in shared:
                self.untied[f"{name}.{leaf}"] = parameter
                _set_parameter(module, leaf, nn.Parameter(parameter.detach().clone()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors by name."""
        tensors: dict[str, Tensor] = {}
        for name in self.modules:
            state = self.model.get_submodule(name).state_dict(keep_vars=True)
            tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in state.items()})
        live = self._live()
        return {**tensors, **{n: live[n] for n in self.initial if n not in tensors}}

    def _live(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def swap(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write `values` into the live tensors and return the old values."""
        live = self._live()
        before = {name: live[name].detach().clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                live[name].copy_(value)
        return before

    def restore_dtypes(self) -> None:
        """Convert the modules back to their initial dtypes, and remove the casts around them."""
        for hook in self._hooks:
            hook.remove()
        for name in self.modules:
            for leaf, tensor in self.model.get_submodule(name).state_dict(keep_vars=True).items():
                tensor.data = tensor.data.to(self.initial[f"{name}.{leaf}"].dtype)

    def tie_again(self) -> None:
        """Restore the parameters that modules shared with the rest of the model."""
        for name, parameter in self.untied.items():
            _set_parameter(self.model, name, parameter)


def check_base_tensors(
    model: nn.Module, saved: list[str], bias: str, adapted: Iterable[nn.Module]
) -> None:
    """Raise UserError for modules or biases that cannot be trained in the base's dtype.

    Args:
        model: the bare model.
        saved: names of the modules to train whole.
        bias: which biases to train, see `LoraConfig.bias`.
        adapted: the modules that LoRA layers wrap.
    """
    is_low = any(p.dtype in LOW_PRECISION for module in adapted for p in module.parameters())
    if bias != "none" and is_low:
        raise UserError(
            f"lora.bias={bias}: not supported with a 16-bit base, whose biases would be trained. "
            "Set model.dtype=float32 or lora.bias=none."
        )
    for name in saved:
        for leaf, parameter in model.get_submodule(name).named_parameters():
            if not parameter.is_floating_point():
                raise UserError(
                    f"lora.modules_to_save: {name}.{leaf} is quantized and cannot be trained."
                )


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)


def _widen(module: nn.Module) -> None:
    """Convert a module to fp32 with new parameters.

    `Module.to` cannot convert parameters without values.
    """
    wide: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dtype in LOW_PRECISION:
                if parameter not in wide:
                    wide[parameter] = nn.Parameter(parameter.detach().float())
                setattr(part, name, wide[parameter])
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.dtype in LOW_PRECISION:
                setattr(part, name, buffer.float())


def _cast_around(module: nn.Module, outside: torch.dtype) -> list[Any]:
    """Cast inputs of an fp32 module in a 16-bit model up, and its outputs back."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    def up(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = tuple(cast(arg, torch.float32) for arg in args)
        return arguments, {key: cast(arg, torch.float32) for key, arg in kwargs.items()}

    def down(_: nn.Module, __: Any, output: Any) -> Any:
        return cast(output, outside)

    return [
        module.register_forward_pre_hook(up, with_kwargs=True),
        module.register_forward_hook(down),
    ]
