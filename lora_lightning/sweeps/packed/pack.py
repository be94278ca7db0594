"""A pack: the threads of its runs, and the frozen base that they share."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lora_lightning.config.saved import read_config
from lora_lightning.distributed.strategies import OneDeviceStrategy
from lora_lightning.lora import UserError
from lora_lightning.lora.batched import unshared_layers
from lora_lightning.lora.layers.lora_layer import LoraLayer
from lora_lightning.training.module import LoraModule
from lora_lightning.training.run import train
from lora_lightning.utils.run_folder import RunFolder
from lora_lightning.utils.terminal import say

from .frozen import share_frozen
from .rng import random_state, set_random_state
from .shared_base import SharedBase
from .slot import Backward, Forward, Slot


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
        folders: Folders of the runs, each with a .hydra/config.yaml.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.slots: list[Slot] = []
        for number, folder in enumerate(folders):
            config = read_config(RunFolder(folder).config)
            config.output_dir = str(folder)
            log = RunFolder(folder).log
            out = log.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            if len(folders) > 1:
                others = ", ".join(other.name for other in folders if other != folder)
                print(f"This run trains in one process with the runs {others}.", file=out)
            self.slots.append(Slot(number, folder, config, out))
        self.back = threading.Semaphore(0)
        self.stopping = False
        self.device = device_of(self.slots[0].config)
        self.base = SharedBase(self.slots, self.device)

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
            self.base.serve()

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
        backbone: Any = model.base_model
        if backbone is model:
            raise UserError(
                f"hydra/launcher=packed: is not supported with {type(model).__name__}, which has "
                "no separate backbone. Use hydra/launcher=process."
            )
        shared = next((other.module for other in self.slots if other.module is not None), None)
        if shared is not None:
            share_frozen(model, shared.model)
        slot.module = module
        unshared_forward = backbone.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, shape = tree_flatten((args, kwargs))
            if not _stackable(leaves, kwargs):
                return unshared_forward(*args, **kwargs)
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
