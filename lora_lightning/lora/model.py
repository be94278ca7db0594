"""A LoRA adapter on a model, with operations to attach, disable, merge and remove it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .config import LoraConfig
from .forward_pass import ForwardPass
from .layers.dora import dora_class_for
from .layers.fused_qkv import SplitConv1D, SplitLinear
from .layers.linear import (
    LoraConv1D,
    LoraLayer,
    LoraLinear,
    lora_class_for,
)
from .layers.parameter import LoraParameter
from .layers.trainable_tokens import (
    ROWS,
    RowsMatch,
    TokenRows,
    match_rows,
)
from .module_index import ModuleIndex
from .moe import refuse_what_peft_mistakes
from .name_patterns import ALL_LINEAR
from .reachability import keep_off_fast_paths, refuse_unreached, refuse_what_peft_refuses
from .running_statistics import running_statistics
from .serialization.validation import check_tensors
from .summary import Summary, summarise
from .target_modules import Match, match_targets
from .tied_weights import can_untie, tied_pairs, untie_all

LOW_PRECISION = (torch.float16, torch.bfloat16)
LINEAR = (LoraLinear, LoraConv1D)


class Adapter:
    """A LoRA adapter in place on `model`, and the handle for every operation on it.

    The constructor freezes the model and wraps the matched modules. It leaves exactly these
    parameters trainable:

    * A and B of every wrapped module
    * the modules in `config.modules_to_save`
    * the biases that `config.bias` selects
    * the rows of the tokens in `config.trainable_token_indices`

    Args:
        model: any torch model, changed in place.
        config: what to adapt and how.
        strict: whether a pattern that matches nothing is an error. True by default.

    Raises:
        UserError: `match_targets` raises it, or the model already carries an adapter.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, *, strict: bool = True) -> None:
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UserError("the model already carries a LoRA adapter: remove that one first.")
        index = ModuleIndex(model, config.modules_to_save)
        matches = match_targets(model, config, strict=strict, index=index)
        self.model = model
        self.config = config
        self.saved_modules = index.saved
        self.removed = False
        """Whether the adapter was removed from the model."""
        self.layers: dict[str, LoraLayer] = {}
        self.token_rows: dict[str, TokenRows] = {}
        """Layers with trainable vocabulary rows by name, including tied layers."""
        self.rows = match_rows(model, config)
        self._aliases = {match.name: match.aliases for match in matches}
        self.alphas = {match.name: match.alpha for match in matches}
        self._hooks: list[Any] = []
        every = model.named_parameters(remove_duplicate=False)
        self._required_grad = {name: p.requires_grad for name, p in every}
        self._tied = tied_pairs(model)
        self.passed_over = index.left_out if config.targets == ALL_LINEAR else {}
        """Layers that `all-linear` leaves out, with the reason."""
        self._check_bias_precision(matches)
        refuse_what_peft_mistakes(model, config, [match.name for match in matches])
        if strict:
            refuse_what_peft_refuses(model, [match.name for match in matches])
        self._check_whole_modules()
        self._check_rows(matches)

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for match in matches:
            self._put_on(match)
        self._hooks += [*self._share_passes(), *keep_off_fast_paths(model)]
        places = {id(module): name for name, module in model.named_modules()}
        self._paths = {name: places[id(layer)] for name, layer in self.layers.items()}
        for rows in self.rows:
            self._wrap_rows(rows)
        self._pristine: dict[str, Tensor] = {}
        self._untied: dict[str, nn.Parameter] = {}
        self._train_extras()

    def _put_on(self, match: Match) -> None:
        settings: dict[str, Any] = {
            "scaling": match.scaling,
            **{name: getattr(self.config, name) for name in ("dropout", "init", "freeze_A")},
        }
        layer: LoraLayer
        if match.parameter is not None:
            around = self.model.get_submodule(match.aliases[0])  # or the wrapper already on it
            layer = LoraParameter(around, match.rank, parameter=match.parameter, **settings)
        elif match.parts is not None:
            split = SplitConv1D if lora_class_for(match.module) is LoraConv1D else SplitLinear
            layer = split(match.module, match.rank, parts=match.parts, **settings)
        else:
            class_for = dora_class_for if self.config.use_dora else lora_class_for
            layer_class = class_for(match.module)
            assert layer_class is not None
            layer = layer_class(match.module, match.rank, **settings)
        self.layers[match.name] = layer
        self._replace(match.name, layer)

    def _share_passes(self) -> list[Any]:
        """Let linear layers share the work that one forward pass of the model needs only once."""
        linear = {n: one for n, one in self.layers.items() if isinstance(one, LINEAR)}
        forward_pass = ForwardPass()
        for layer in linear.values():
            layer.forward_pass = forward_pass
        return forward_pass.watch(self.model, linear) if linear else []

    def _check_bias_precision(self, matches: list[Match]) -> None:
        low = any(p.dtype in LOW_PRECISION for m in matches for p in m.module.parameters())
        if self.config.bias != "none" and low:
            raise UserError(
                f"lora.bias={self.config.bias} trains biases of the base itself, which needs "
                "model.dtype=float32; with a 16-bit base use lora.bias=none."
            )

    def _check_whole_modules(self) -> None:
        for name in self.saved_modules:
            for leaf, parameter in self.model.get_submodule(name).named_parameters():
                if not parameter.is_floating_point():
                    raise UserError(
                        f"lora.modules_to_save: {name}.{leaf} is quantised and cannot be trained."
                    )

    def _check_rows(self, matches: list[Match]) -> None:
        adapted = {alias for match in matches for alias in match.aliases}
        for name in (name for rows in self.rows for name in (rows.name, *rows.tied)):
            if name in adapted or name in self.saved_modules:
                option = "targets" if name in adapted else "modules_to_save"
                raise UserError(
                    f"rows of new tokens are trained in {name}, which lora.{option} names too: "
                    "leave out one of them."
                )
            bias = getattr(self.model.get_submodule(name), "bias", None)
            if self.config.bias == "all" and bias is not None:
                raise UserError(f"lora.bias=all: {name} has trained rows, not a trained bias.")

    def _wrap_rows(self, rows: RowsMatch) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        first: TokenRows | None = None
        for name in (rows.name, *rows.tied):
            layer: Any = modules[name]
            wrapped = TokenRows(layer, rows.indices, tied_to=first)
            first = first or wrapped
            self.token_rows[name] = wrapped
            self._aliases[name] = tuple(n for n, module in modules.items() if module is layer)
            self._replace(name, wrapped)

    @property
    def _wrappers(self) -> dict[str, LoraLayer | TokenRows]:
        return {**self.layers, **self.token_rows}

    def _replace(self, name: str, module: nn.Module) -> None:
        for alias in self._aliases[name]:
            parent, _, leaf = alias.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, module)

    def _train_extras(self) -> None:
        """Make whole modules and biases trainable in fp32 and keep their initial values."""
        for name in self.saved_modules:
            module = self.model.get_submodule(name)
            self._untie(name, module)
            for leaf, tensor in module.state_dict(keep_vars=True).items():
                self._pristine[f"{name}.{leaf}"] = tensor.detach().clone()
            low = [p.dtype for p in module.parameters() if p.dtype in LOW_PRECISION]
            if low:
                _widen(module)
                self._hooks += _cast_around(module, low[0])
            module.requires_grad_(True)
        for name, statistic in running_statistics(self.model).items():
            self._pristine.setdefault(name, statistic.clone())
        for name, parameter in self.model.named_parameters():
            if name in self._pristine or not _is_bias(name):
                continue
            of_layer = name.endswith(".base_layer.bias")
            if self.config.bias == "all" or (self.config.bias == "lora_only" and of_layer):
                self._pristine[name] = parameter.detach().clone()
                parameter.requires_grad_(True)

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
                self._untied[f"{name}.{leaf}"] = parameter
                _set_parameter(module, leaf, nn.Parameter(parameter.detach().clone()))

    # What belongs to the adapter -------------------------------------------------------------

    def named_tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors by their names in a PEFT file, without the prefix.

        This is the only place that defines the contents of an adapter. The tensors are live.
        """
        return self._tensors_of({n: layer.named_tensors() for n, layer in self.layers.items()})

    def exported_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a file.

        An adapter that started from the weights is stored as plain LoRA.
        """
        return self._tensors_of({n: layer.exported_tensors() for n, layer in self.layers.items()})

    def _tensors_of(self, layers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        own = {
            f"{self._paths[name]}.{leaf}": tensor
            for name, tensors in layers.items()
            for leaf, tensor in tensors.items()
        }
        return {**own, **self._extras()}

    def from_zero(self) -> list[nn.Parameter]:
        """Return the matrix of each layer that starts at zero, B or (in an embedding) A."""
        return [
            layer.lora_A if layer.random_matrix == "lora_B" else layer.lora_B
            for layer in self.layers.values()
        ]

    def _extras(self) -> dict[str, Tensor]:
        """Return the tensors that training changes besides the layers' matrices.

        These are whole modules, biases, rows and running statistics.
        """
        tensors: dict[str, Tensor] = {
            f"{rows.name}.{ROWS}": self.token_rows[rows.name].rows for rows in self.rows
        }
        for name in self.saved_modules:
            state = self.model.get_submodule(name).state_dict(keep_vars=True)
            tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in state.items()})
        live = self._live()
        tensors.update({name: live[name] for name in self._pristine if name not in tensors})
        return tensors

    def _live(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def check_gradients(self) -> list[str]:
        """Check that a backward pass has reached the trainable tensors.

        Call it after the first backward pass.

        Returns:
            Names of tensors that this pass missed but another may reach, such as some experts.

        Raises:
            UserError: the pass missed tensors that no other pass can reach. The model does not
                call their layers, or reads the weights without calling them.
        """
        return refuse_unreached({n: t for n, t in self.named_tensors().items() if t.requires_grad})

    def check_frozen(self) -> None:
        """Check that every trainable parameter is stored with the adapter.

        Raises:
            UserError: something has unfrozen a layer of the base.
        """
        own = {id(tensor) for tensor in self.named_tensors().values()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in own:
                module = name.replace(".base_layer", "").rpartition(".")[0]
                raise UserError(
                    f"{name} of the frozen base is to be trained, and no adapter stores it: has a "
                    f"callback unfrozen it? Train its module whole, lora.modules_to_save=[{module}]"
                    ", or leave it frozen."
                )

    def load_tensors(self, tensors: dict[str, Tensor], *, source: str = "the adapter") -> None:
        """Copy `tensors` from a file into the live adapter.

        Raises:
            UserError: a tensor is missing, unexpected, of the wrong shape, or not finite. The
                adapter is then unchanged.
        """
        own = self.named_tensors()
        tensors = {**running_statistics(self.model), **tensors}  # PEFT stores no statistics
        for name, layer in self.layers.items():
            key = f"{self._paths[name]}.lora_B.weight"
            if key in tensors:
                try:
                    tensors[key] = layer.own_B(tensors[key])
                except UserError as error:
                    raise UserError(
                        f"{source} does not fit lora.parts of {name}: {error}"
                    ) from None
        check_tensors(own, tensors, source=source)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def start_at(self, matrices: dict[str, Tensor]) -> None:
        """Replace the initial A, (r, in), of some layers, which still equal their bases."""
        with torch.no_grad():
            for name, a in matrices.items():
                self.layers[name].lora_A.copy_(a)

    # Switching -------------------------------------------------------------------------------

    def set_enabled(self, enabled: bool) -> None:
        """Enable or disable low-rank updates and trained rows.

        Other trained tensors stay in place. Disabling also removes merged updates from the weights.
        """
        if not enabled:
            self.unmerge()
        for layer in self._wrappers.values():
            layer.enabled = enabled

    def set_fused(self, fused: bool) -> None:
        """Set whether linear layers use one fused step with their bases or plain operations.

        The fused step is the default. Plain operations call each base layer as a module.
        Transforms of `torch.func`, such as per-sample gradients, need plain operations. The
        results are the same, but plain operations take more time and memory.
        """
        for layer in self.layers.values():
            layer.fused = fused

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the block with the base model exactly as it was before the adapter."""
        was = {name: layer.enabled for name, layer in self._wrappers.items()}
        merged = any(layer.merged for layer in self._wrappers.values())
        self.set_enabled(False)
        trained = self._swap_extras(self._pristine)
        try:
            yield
        finally:
            self._swap_extras(trained)
            for name, layer in self._wrappers.items():
                layer.enabled = was[name]
            if merged:
                self.merge()

    def _swap_extras(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write `values` into whole modules, biases and statistics and return the old values."""
        live = self._live()
        before = {name: live[name].detach().clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                live[name].copy_(value)
        return before

    def merge(self) -> None:
        """Replace every adapted weight with W + s B A and insert trained rows into their matrix.

        On error no layer is merged.

        Raises:
            UserError: a base weight is quantized, or a merged weight is not finite.
        """
        try:
            for name, layer in self._wrappers.items():
                try:
                    layer.merge()
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None
        except UserError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Restore the original weights exactly."""
        for layer in self._wrappers.values():
            layer.unmerge()

    def remove(self) -> nn.Module:
        """Remove the adapter and return the model bit for bit as it was before.

        Whole modules, biases and running statistics get their initial values back.
        """
        self.unmerge()
        self._swap_extras(self._pristine)
        model = self._unwrap()
        for name, parameter in self._untied.items():
            _set_parameter(model, name, parameter)
        return model

    def merge_and_unload(self) -> nn.Module:
        """Merge permanently, remove the wrappers and return a model of plain layers.

        Whole modules, biases and statistics keep their trained values. A weight tied to an adapted
        weight keeps its own value, so the model's config no longer declares tied weights.

        Raises:
            UserError: `merge` raises it, or the architecture cannot be stored with untied weights
                (T5).
        """
        self.merge()
        config = getattr(self.model, "config", None)
        if getattr(config, "tie_word_embeddings", False) and tied_pairs(self.model) < self._tied:
            if not can_untie(config):
                self.unmerge()
                raise UserError(
                    f"{type(self.model).__name__} always ties its embeddings, so that an adapter "
                    "on one of them cannot be merged for good. Use the adapter unmerged."
                )
            config.tie_word_embeddings = False  # type: ignore[union-attr]
            untie_all(self.model)
        for layer in self._wrappers.values():
            layer._pristine_weight = None
        return self._unwrap()

    def _unwrap(self) -> nn.Module:
        for name, layer in self.layers.items():
            self._replace(name, layer.adapted[0])
        for name, rows in self.token_rows.items():
            self._replace(name, rows.base_layer)
        for hook in self._hooks:
            hook.remove()
        for name in self.saved_modules:
            module = self.model.get_submodule(name)
            for leaf, tensor in module.state_dict(keep_vars=True).items():
                tensor.data = tensor.data.to(self._pristine[f"{name}.{leaf}"].dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, False))
        self.layers, self.token_rows, self.rows = {}, {}, []
        self.removed = True
        return self.model

    # Reporting -------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Return what the adapter covers, as data and as a table."""
        return summarise(self)


def _is_bias(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "bias"


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
