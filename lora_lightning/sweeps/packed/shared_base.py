"""The frozen base of a pack: it answers the requests of the runs, stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.lora.batched import Stack, stacked_model

from .rng import SlotwiseRandomness, set_torch_state, torch_state
from .slot import Backward, Forward, Pass, Slot


class SharedBase:
    """The frozen base of a pack.

    Args:
        slots: Runs of the pack.
        device: Device of the base.
    """

    def __init__(self, slots: list[Slot], device: torch.device) -> None:
        self.slots, self.device = slots, device
        self.stack = Stack(randomness=self._randomness)
        self.stacked: nn.Module | None = None

    def serve(self) -> None:
        """Answer some waiting requests: backward passes first, then the runs furthest behind."""
        waiting = [slot for slot in self.slots if not slot.ended]
        done = [(s, s.request.forward_pass) for s in waiting if isinstance(s.request, Backward)]
        if done:
            passed = done[0][1]
            served = [slot for slot, other in done if other is passed]
            self._answer(served, lambda: self._backward(passed))
            return
        calls = [(slot, slot.request) for slot in waiting if isinstance(slot.request, Forward)]
        first = min(calls, key=lambda call: call[1].order)[1]
        same = [(slot, request) for slot, request in calls if request.key == first.key]
        bare = [slot for slot, request in same if slot.is_base and request.asks_the_same(first)]
        if not first.grad and len(bare) > 1:
            self._answer(bare, lambda: self._forward_once(bare))
            return
        served = [slot for slot, _ in same][: self._slots_per_pass(first)]
        self._answer(served, lambda: self._forward(served))

    @staticmethod
    def _answer(slots: list[Slot], work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            for slot in slots:
                assert slot.request is not None
                slot.request.error = error

    def _slots_per_pass(self, call: Forward) -> int:
        """Return the number of slots in a pass, as data.max_tokens allows."""
        module = self.slots[0].module or next(s.module for s in self.slots if s.module)
        data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        limit = data.max_tokens
        return len(self.slots) if limit is None else max(1, limit // call.tokens)

    def _model(self) -> nn.Module:
        if self.stacked is None:
            backbones = {
                slot.number: slot.module.model.base_model
                for slot in self.slots
                if slot.module is not None and not slot.ended
            }
            self.stacked = stacked_model(backbones, self.stack)  # type: ignore[arg-type]
            for module in self.stacked.modules():
                module.__dict__.pop("forward", None)  # the copied `forward` would wait for itself
        return self.stacked

    def _forward(self, slots: list[Slot]) -> None:
        requests = [slot.request for slot in slots]
        first = requests[0]
        assert isinstance(first, Forward)
        leaves = [
            torch.cat([request.leaves[place] for request in requests])  # type: ignore[union-attr]
            if isinstance(leaf, Tensor)
            else leaf
            for place, leaf in enumerate(first.leaves)
        ]
        args, kwargs = tree_unflatten(leaves, first.shape)
        model = self._model()
        model.train(first.training)
        enabled, dtype = first.autocast
        with (
            self.stack.of([slot.number for slot in slots]),
            torch.inference_mode(first.inference),
            torch.set_grad_enabled(first.grad),
            torch.autocast(self.device.type, dtype=dtype, enabled=enabled),
            SlotwiseRandomness(self.stack) if first.training else nullcontext(),
        ):
            output = model(*args, **kwargs)
            self._hand_out(slots, output)

    def _forward_once(self, slots: list[Slot]) -> None:
        """Run one pass for all slots, whose untrained models give equal outputs for equal rows."""
        first, *others = slots
        self._forward([first])
        assert isinstance(first.request, Forward)
        leaves, shape = tree_flatten(first.request.answer)
        for slot in others:
            copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            assert slot.request is not None
            slot.request.answer = tree_unflatten(copies, shape)

    def _hand_out(self, slots: list[Slot], output: Any) -> None:
        """Give each slot its rows of the output."""
        leaves, shape = tree_flatten(output)
        graded = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        passed = Pass(slots, graded, {})
        for index, slot in enumerate(slots):
            rows, parts = [], []
            for leaf in leaves:
                if not isinstance(leaf, Tensor):
                    rows.append(leaf)
                    continue
                part = leaf.chunk(len(slots))[index]
                if leaf.requires_grad:
                    part = part.detach().requires_grad_()
                    parts.append(part)
                rows.append(part)
            passed.parts[slot.number] = parts
            assert slot.request is not None
            slot.request.answer = tree_unflatten(rows, shape)
            slot.passed = passed if graded else None

    def _backward(self, passed: Pass) -> None:
        outputs, grads = [], []
        for place, output in enumerate(passed.outputs):
            parts = [passed.parts[slot.number][place] for slot in passed.slots]
            if any(part.grad is not None for part in parts):
                outputs.append(output)
                grads.append(
                    torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in parts])
                )
        with self.stack.of([slot.number for slot in passed.slots]):
            torch.autograd.backward(outputs, grads)
        for slot in passed.slots:
            if isinstance(slot.request, Backward):
                slot.request.answer = True

    @contextmanager
    def _randomness(self, number: int) -> Iterator[None]:
        """Use a slot's own generators for the random numbers of a stacked pass."""
        slot = self.slots[number]
        cpu, cuda, *others = slot.random
        set_torch_state(cpu, cuda)
        try:
            yield
        finally:
            slot.random = (*torch_state(), *others)
