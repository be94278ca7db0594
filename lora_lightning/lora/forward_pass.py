"""State that the layers of an adapter share during a forward pass of their model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .casts import Casts, cast_frozen
from .fused_group import Linear, fused_group

if TYPE_CHECKING:
    from .layers.lora_layer import LoraLayer

_Group = tuple["weakref.ref[LoraLayer]", ...]


class Flight:
    """A marker that a graph holds until its backward pass, or until the graph is dropped."""


class _Input(NamedTuple):
    """An input of layers, with other state that their outputs depend on."""

    tensor: weakref.ref[Tensor]
    state: tuple[Any, ...]

    @classmethod
    def of(cls, x: Tensor) -> _Input:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(weakref.ref(x), (x._version, torch.is_grad_enabled(), *autocast))

    def equals(self, other: _Input) -> bool:
        return self.tensor() is other.tensor() and self.state == other.state


class _Rest(NamedTuple):
    """Outputs of a group that are computed but not yet requested."""

    first: weakref.ref[LoraLayer]
    input: _Input
    layers: _Group
    outputs: tuple[Tensor, ...]


class ForwardPass:
    """Copies of A and B, and joint products of layers with a common input.

    One pass detects successive layers with the identical input, such as query, key and value.
    These layers form a group in later passes. The first layer computes the outputs of all. Each
    other layer returns its own output if its input is identical to the first layer's. If not, the
    layer computes its output itself and the group is given up.

    Groups do not change while a graph is in flight, because gradient checkpointing must repeat
    the forward pass.

    A pass is one call of the module that `watch` selects.

    Attributes:
        casts: the copies of A and B.
    """

    def __init__(self) -> None:
        self.casts = Casts()
        self._groups: dict[int, _Group] = {}
        """Groups by the identity of their first layer.

        After a group is given up, it holds only its first layer.
        """
        self._detected: dict[weakref.ref[LoraLayer], _Group] = {}
        self._given_up: _Group = ()
        """First layers of the groups to give up."""
        self._rest: _Rest | None = None
        self._run: _Group = ()
        """Ungrouped layers called in succession with the same input so far."""
        self._input: _Input | None = None
        """Input of `_run`."""
        self._flight: weakref.ref[Flight] | None = None

    def __reduce__(self) -> tuple[type[ForwardPass], tuple[()]]:
        return ForwardPass, ()  # a copied model has its own passes

    def watch(self, model: nn.Module, names: Iterable[str]) -> list[Any]:
        """Treat each call of the smallest module around the named modules as a pass.

        Args:
            model: the whole model.
            names: names of modules in it.

        Returns:
            Hook handles.
        """
        parents = [name.split(".")[:-1] for name in names]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
        path = [parts[0] for parts in shared]
        while path and type(model.get_submodule(".".join(path))).forward is nn.Module.forward:
            path.pop()  # a module list is never called
        module = model.get_submodule(".".join(path))
        return [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.casts.begin()
        self._rest, self._run, self._input = None, (), None
        in_flight = self._flight is not None and self._flight() is not None
        if (self._detected or self._given_up) and not in_flight:
            self._regroup()

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        failed = output is None
        self.casts.end(failed=failed)
        if self._rest is not None and not failed:
            self._given_up += (self._rest.first,)
        self._end_run()
        self._rest, self._input = None, None

    def _end_run(self) -> None:
        if len(self._run) == len(set(self._run)) > 1:
            self._detected[self._run[0]] = self._run
        self._run = ()

    def _regroup(self) -> None:
        for first in self._given_up:
            self._groups[id(first())] = (first,)
        taken = {layer for group in self._groups.values() for layer in group}
        for first, group in self._detected.items():
            if taken.isdisjoint(group):
                self._groups[id(first())] = group
                taken.update(group)
        self._detected, self._given_up = {}, ()

    def flight(self) -> Flight:
        """Return the marker that graphs must hold until their backward pass."""
        flight = None if self._flight is None else self._flight()
        if flight is None:
            flight = Flight()
            self._flight = weakref.ref(flight)
        return flight

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor | None:
        """Return the layer's output for x if it is computed together with others, else None."""
        rest, self._rest = self._rest, None
        if x.is_inference():  # changes of x are then not tracked
            return None
        current = _Input.of(x)
        if rest is not None:
            if rest.layers[0]() is layer and rest.input.equals(current):
                if len(rest.layers) > 1:
                    self._rest = rest._replace(layers=rest.layers[1:], outputs=rest.outputs[1:])
                return rest.outputs[0]
            self._given_up += (rest.first,)
        group = self._groups.get(id(layer), ())
        if len(group) > 1 and group[0]() is layer:
            outputs = self._compute([layer() for layer in group], x)
            if outputs is not None:
                self._rest = _Rest(group[0], current, group[1:], tuple(outputs[1:]))
                return outputs[0]
        elif layer.only_adds() and layer.frozen(x) is not None:
            if self._input is None or not self._input.equals(current):
                self._end_run()
                self._input = current
            self._run += (weakref.ref(layer),)
        return None

    def _compute(self, layers: list[LoraLayer | None], x: Tensor) -> list[Tensor] | None:
        """Return outputs of layers with the same input, or None if they must be separate."""
        steps: list[Linear] = []
        for layer in layers:
            frozen = layer.frozen(x) if layer is not None and layer.only_adds() else None
            if layer is None or frozen is None:
                return None
            weight, bias, dtype = frozen
            steps.append(
                Linear(
                    cast_frozen(weight, dtype),
                    None if bias is None else bias.to(dtype),
                    layer.lora_A,
                    layer.lora_B,
                    self.casts.cast(layer.lora_B, dtype),
                    layer.scaling,
                )
            )
        if len({(step.scaling, step.lora_A.dtype) for step in steps}) > 1:
            return None
        a = self.casts.join(tuple(step.lora_A for step in steps), dtype)
        return fused_group(x.to(dtype), steps, a, flight=self.flight())
