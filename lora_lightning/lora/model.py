"""A LoRA adapter on a model, with operations to attach, disable, merge and remove it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .base_tensors import BaseTensors, check_base_tensors
from .config import LoraConfig
from .forward_pass import ForwardPass
from .layers.factory import build_layer
from .layers.linear import LoraConv1D, LoraLinear
from .layers.lora_layer import LoraLayer
from .layers.trainable_tokens import ROWS, RowsMatch, TokenRows, check_rows, match_rows
from .module_index import ModuleIndex
from .moe import check_mistaken_experts
from .name_patterns import ALL_LINEAR
from .reachability import check_frozen_base, check_mixers, check_reached, keep_off_fast_paths
from .running_statistics import running_statistics
from .serialization.validation import check_tensors
from .summary import Summary, summarize
from .target_modules import Match, match_targets
from .tied_weights import declare_untied, tied_pairs


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
            raise UserError("the model already has a LoRA adapter: remove that one first.")
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
        self.alphas = {match.name: match.alpha for match in matches}
        self.skipped_layers = index.skipped if config.targets == ALL_LINEAR else {}
        """Layers that `all-linear` leaves out, with the reason."""
        self._aliases = {**index.aliases, **{match.name: match.aliases for match in matches}}
        self._tied = tied_pairs(model)
        every = model.named_parameters(remove_duplicate=False)
        self._required_grad = {name: p.requires_grad for name, p in every}
        self._check(matches, strict=strict)

        model.requires_grad_(False)
        for match in matches:
            module = model.get_submodule(match.aliases[0])  # or the layer already around it
            self.layers[match.name] = build_layer(module, match, config)
            self._replace(match.name, self.layers[match.name])
        self._hooks = [*self._share_passes(), *keep_off_fast_paths(model)]
        places = {id(module): name for name, module in model.named_modules()}
        self._paths = {name: places[id(layer)] for name, layer in self.layers.items()}
        for rows in self.rows:
            self._wrap_rows(rows)
        self.base_tensors = BaseTensors(model, self.saved_modules, config.bias)

    def _check(self, matches: list[Match], *, strict: bool) -> None:
        """Raise UserError for settings that the matched modules do not support."""
        names = [match.name for match in matches]
        config, modules = self.config, [match.module for match in matches]
        check_base_tensors(self.model, self.saved_modules, config.bias, modules)
        check_mistaken_experts(self.model, config, names)
        if strict:
            check_mixers(self.model, names)
        adapted = {alias for match in matches for alias in match.aliases}
        check_rows(self.model, self.rows, adapted, self.saved_modules, config.bias)

    def _share_passes(self) -> list[Any]:
        """Let linear layers share the work that one forward pass of the model needs only once."""
        kinds = (LoraLinear, LoraConv1D)
        linear = {n: layer for n, layer in self.layers.items() if isinstance(layer, kinds)}
        forward_pass = ForwardPass()
        for layer in linear.values():
            layer.forward_pass = forward_pass
        return forward_pass.watch(self.model, linear) if linear else []

    def _wrap_rows(self, rows: RowsMatch) -> None:
        first: TokenRows | None = None
        for name in (rows.name, *rows.tied):
            layer: Any = self.model.get_submodule(name)
            self.token_rows[name] = TokenRows(layer, rows.indices, tied_to=first)
            first = first or self.token_rows[name]
            self._replace(name, self.token_rows[name])

    @property
    def _wrappers(self) -> dict[str, LoraLayer | TokenRows]:
        return {**self.layers, **self.token_rows}

    def _replace(self, name: str, module: nn.Module) -> None:
        for alias in self._aliases[name]:
            parent, _, leaf = alias.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, module)

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
        matrices = {
            f"{self._paths[name]}.{leaf}": tensor
            for name, tensors in layers.items()
            for leaf, tensor in tensors.items()
        }
        rows = {f"{rows.name}.{ROWS}": self.token_rows[rows.name].rows for rows in self.rows}
        return {**matrices, **rows, **self.base_tensors.tensors()}

    def zero_initialized(self) -> list[nn.Parameter]:
        """Return the matrix of each layer that starts at zero, B or (in an embedding) A."""
        return [
            layer.lora_A if layer.random_matrix == "lora_B" else layer.lora_B
            for layer in self.layers.values()
        ]

    def check_gradients(self, received: Collection[str] | None = None) -> list[str]:
        """Check that a backward pass has reached the trainable tensors.

        Call it after the first backward pass.

        Args:
            received: names of the tensors that have received a gradient; None: those that hold one.

        Returns:
            Names of tensors that this pass missed but another may reach, such as some experts.

        Raises:
            UserError: the pass missed tensors that no other pass can reach. The model does not
                call their layers, or reads the weights without calling them.
        """
        tensors = {n: t for n, t in self.named_tensors().items() if t.requires_grad}
        return check_reached(tensors, received)

    def check_frozen(self) -> None:
        """Check that every trainable parameter is stored with the adapter.

        Raises:
            UserError: something has unfrozen a layer of the base.
        """
        check_frozen_base(self.model, self.named_tensors().values())

    def load_tensors(self, tensors: dict[str, Tensor], *, source: str = "the adapter") -> None:
        """Copy `tensors` from a file into the live adapter.

        Raises:
            UserError: a tensor is missing, unexpected, of the wrong shape, or not finite. The
                adapter is then unchanged.
        """
        live = self.named_tensors()
        tensors = {**running_statistics(self.model), **tensors}  # PEFT stores no statistics
        for name, layer in self.layers.items():
            key = f"{self._paths[name]}.lora_B.weight"
            if key in tensors:
                try:
                    tensors[key] = layer.lora_B_from_file(tensors[key])
                except UserError as error:
                    message = f"{source} does not fit lora.parts of {name}: {error}"
                    raise UserError(message) from None
        check_tensors(live, tensors, source=source)
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(tensors[name])

    def set_initial_A(self, matrices: dict[str, Tensor]) -> None:
        """Replace the initial A, (r, in), of some layers, which still equal their bases."""
        with torch.no_grad():
            for name, a in matrices.items():
                self.layers[name].lora_A.copy_(a)

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
        trained = self.base_tensors.swap(self.base_tensors.initial)
        try:
            yield
        finally:
            self.base_tensors.swap(trained)
            for name, layer in self._wrappers.items():
                layer.enabled = was[name]
            if merged:
                self.merge()

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
        self.base_tensors.swap(self.base_tensors.initial)
        model = self._unwrap()
        self.base_tensors.tie_again()
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
        try:
            declare_untied(self.model, tied_before=self._tied)
        except UserError:
            self.unmerge()
            raise
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
        self.base_tensors.restore_dtypes()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, False))
        self.layers, self.token_rows, self.rows = {}, {}, []
        self.removed = True
        return self.model

    def summary(self) -> Summary:
        """Return what the adapter covers, as data and as a table."""
        return summarize(self)
