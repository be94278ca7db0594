"""A pack: the threads of its runs, and the frozen base that they share."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.config.saved import read_config
from lora_lightning.distributed.strategies import OneDeviceStrategy
from lora_lightning.lora import UserError
from lora_lightning.lora.batched import Stack, stacked_model, unshared_layers
from lora_lightning.lora.layers.lora_layer import LoraLayer
from lora_lightning.training.module import LoraModule
from lora_lightning.training.run import train
from lora_lightning.utils.terminal import say

from .frozen import share_frozen
from .rng import (
    SlotwiseRandomness,
    random_state,
    set_random_state,
    set_torch_state,
    torch_state,
)
from .slot import (
    Backward,
    Forward,
    Pass,
    Slot,
)

LOG = "log.txt"


class SlotStrategy(OneDeviceStrategy):
    """Strategy for one device, whose frozen base several runs share."""

    def __init__(self, pack: Pack, slot: Slot, device: torch.device) -> None:
        super().__init__(device)
        self.pack, self.slot = pack, slot

    def setup(self, trainer: L.Trainer) -> None:
        self.slot.trainer = trainer
        self.slot.has_fit |= trainer.state.fn == "fit"
        module = self.lightning_module
        assert isinstance(module, LoraModule)
        fresh = not self.slot.has_fit and module.start_from is None
        self.slot.is_base = fresh and _adds_nothing(module.model.base_model)  # type: ignore
        super().setup(trainer)

    def model_to_device(self) -> None:
        assert isinstance(self.lightning_module, LoraModule)
        if self.slot.module is None:
            self.pack.share(self.slot, self.lightning_module)
        super().model_to_device()

    def post_backward(self, closure_loss: Tensor) -> None:
        self.pack.finish_backward(self.slot)


class Pack:
    """A set of runs that train together.

    Args:
        folders: folders of the runs, each with a .hydra/config.yaml.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.slots: list[Slot] = []
        for number, folder in enumerate(folders):
            config = read_config(folder / ".hydra" / "config.yaml")
            config.output_dir = str(folder)
            out = (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            if len(folders) > 1:
                others = ", ".join(other.name for other in folders if other != folder)
                print(f"Trains in one process with the runs {others}.", file=out)
            self.slots.append(Slot(number, folder, config, out))
        self.back = threading.Semaphore(0)
        self.stopping = False
        self.stack = Stack(randomness=self._randomness)
        self.stacked: nn.Module | None = None
        self.device = device_of(self.slots[0].config)

    # The threads -------------------------------------------------------------------------------

    def run(self) -> None:
        """Train all runs to their end; each slot's `error` holds what failed."""
        for slot in self.slots:
            slot.random = random_state()
            slot.thread = threading.Thread(target=self._body, args=[slot], daemon=True)
            slot.thread.start()
        try:
            self._loop()
        except KeyboardInterrupt:
            self.stopping = True
            for slot in self.slots:
                while not slot.ended:
                    self._turn(slot)
            raise
        finally:
            for slot in self.slots:
                slot.out.close()

    def _loop(self) -> None:
        while True:
            for slot in self.slots:
                request = slot.request
                free = request is None or request.answer is not None or request.error is not None
                if free and not slot.ended:
                    self._turn(slot)
            if all(slot.ended for slot in self.slots):
                return
            self._serve()

    def _turn(self, slot: Slot) -> None:
        """Let a run work until it waits again or ends."""
        outside = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = slot.out
        set_random_state(slot.random)
        interrupted = False
        slot.go.release()
        while True:
            try:
                self.back.acquire()
                break
            except KeyboardInterrupt:  # deferred until the run waits
                interrupted = True
        slot.random = random_state()
        sys.stdout, sys.stderr = outside
        if interrupted:
            raise KeyboardInterrupt

    def _body(self, slot: Slot) -> None:
        slot.go.acquire()
        try:
            strategy = SlotStrategy(self, slot, self.device)
            train(
                slot.config,
                resume=True,
                strategy=strategy,
                devices=1,
                enable_progress_bar=False,  # a process can have only one
            )
        except UserError as error:
            slot.error = error
            say(f"error: {error}", file=slot.out)
        except BaseException as error:
            slot.error = error
            if not self.stopping:
                say(traceback.format_exc(), file=slot.out, end="")
        finally:
            slot.ended = True
            slot.request = slot.passed = None
            self.back.release()

    def _wait(self, slot: Slot, request: Forward | Backward) -> Any:
        """Hand in a request from a run's thread, and return its answer."""
        slot.request = request
        self.back.release()
        slot.go.acquire()
        if self.stopping:
            raise SystemExit("the sweep was stopped")
        if request.error is not None:
            raise request.error
        return request.answer

    # Called by a run ---------------------------------------------------------------------------

    def share(self, slot: Slot, module: LoraModule) -> None:
        """Share the first model's frozen tensors with a run's model, and stack its backbone calls.

        Raises:
            UserError: the model cannot be shared.
        """
        model = module.model
        assert model is not None
        backbone: Any = model.base_model
        if backbone is model:
            raise UserError(
                f"{type(model).__name__} has no separate backbone, so that its adapters cannot be "
                "trained together. Use the process launcher: hydra/launcher=process."
            )
        shared = next((other.module for other in self.slots if other.module is not None), None)
        if shared is not None:
            share_frozen(model, shared.model)
        slot.module = module
        alone = backbone.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, shape = tree_flatten((args, kwargs))
            if not _stackable(leaves, kwargs):
                return alone(*args, **kwargs)
            kind = self.device.type
            request = Forward(
                leaves,
                shape,
                training=backbone.training,
                grad=torch.is_grad_enabled(),
                inference=torch.is_inference_mode_enabled(),
                autocast=(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
                order=slot.order,
            )
            return self._wait(slot, request)

        backbone.forward = forward

    def finish_backward(self, slot: Slot) -> None:
        """Wait until the gradients of a run's last pass have passed back through the base."""
        if slot.passed is not None:
            passed, slot.passed = slot.passed, None
            self._wait(slot, Backward(passed))

    # The base ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Answer some waiting requests: backward passes first, then the runs furthest behind."""
        waiting = [slot for slot in self.slots if not slot.ended]
        passes = [slot.request.of for slot in waiting if isinstance(slot.request, Backward)]
        if passes:
            passed = passes[0]
            served = [s for s in waiting if s.request and getattr(s.request, "of", 0) is passed]
            self._answer(served, lambda: self._backward(passed))
            return
        calls = [(slot, slot.request) for slot in waiting if isinstance(slot.request, Forward)]
        first = min(calls, key=lambda call: call[1].order)[1]
        same = [(slot, request) for slot, request in calls if request.key == first.key]
        bare = [slot for slot, request in same if slot.is_base and request.asks_the_same(first)]
        if not first.grad and len(bare) > 1:
            self._answer(bare, lambda: self._forward_once(bare))
            return
        served = [slot for slot, _ in same][: self._at_a_time(first)]
        self._answer(served, lambda: self._forward(served))

    @staticmethod
    def _answer(slots: list[Slot], work: Any) -> None:
        try:
            work()
        except Exception as error:
            for slot in slots:
                assert slot.request is not None
                slot.request.error = error

    def _at_a_time(self, call: Forward) -> int:
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
        found, shape = tree_flatten(first.request.answer)
        for slot in others:
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in found]
            assert slot.request is not None
            slot.request.answer = tree_unflatten(own, shape)

    def _hand_out(self, slots: list[Slot], output: Any) -> None:
        """Give each slot its rows of the output."""
        found, shape = tree_flatten(output)
        graded = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
        passed = Pass(slots, graded, {})
        for index, slot in enumerate(slots):
            own, parts = [], []
            for leaf in found:
                if not isinstance(leaf, Tensor):
                    own.append(leaf)
                    continue
                part = leaf.chunk(len(slots))[index]
                if leaf.requires_grad:
                    part = part.detach().requires_grad_()
                    parts.append(part)
                own.append(part)
            passed.parts[slot.number] = parts
            assert slot.request is not None
            slot.request.answer = tree_unflatten(own, shape)
            slot.passed = passed if graded else None

    def _backward(self, passed: Pass) -> None:
        outputs, grads = [], []
        for place, output in enumerate(passed.outputs):
            parts = [passed.parts[slot.number][place] for slot in passed.slots]
            if any(part.grad is not None for part in parts):
                found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
                outputs.append(output)
                grads.append(torch.cat(found))
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


def _stackable(leaves: list[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of a backbone is a batch of whole rows without a cache."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return False
    rows = {tensor.shape[0] if tensor.dim() > 1 else None for tensor in tensors}
    plain = all(leaf is None or isinstance(leaf, (Tensor, bool, int, str)) for leaf in leaves)
    return plain and len(rows) == 1 and None not in rows


def _adds_nothing(backbone: nn.Module) -> bool:
    """Return whether all trainable parts of a backbone are LoRA layers with a zero update."""
    layers = [backbone.get_submodule(name) for name in unshared_layers(backbone)]
    return all(isinstance(layer, LoraLayer) and not layer.lora_B.any() for layer in layers)


def device_of(config: DictConfig) -> torch.device:
    """Return the device on which the runs of a pack train."""
    accelerator = str(config.trainer.get("accelerator", "auto"))
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda", 0) if gpu else torch.device("cpu")
