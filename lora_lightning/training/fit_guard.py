"""Checks at each optimizer step of a fit, which refuse a training that would go wrong silently."""

from __future__ import annotations

import sys
from functools import partial

from torch import Tensor, nn

from lora_lightning.lora.running_statistics import buffer_checksums, check_buffers_unchanged
from lora_lightning.utils.terminal import say

from .adapter_module import AdapterModule


class FitGuard:
    """Checks of a fit at each optimizer step, before the optimizer changes anything.

    The base must stay frozen, and a gradient must reach every trainable tensor.

    Args:
        module: Module at the start of its training.
    """

    def __init__(self, module: AdapterModule) -> None:
        self._module = module
        self._unreached: set[str] | None = None
        """Trainable tensors without a gradient so far. None before the first step."""
        self._checked_epoch = -1
        """The last epoch in which the base was checked."""
        self._buffers = {} if module.adapter is None else self._checksums()
        self._received: set[str] | None = None
        """Tensors that have received a gradient, noted where DeepSpeed frees gradients early."""
        if hasattr(module.trainer.strategy, "scale_gradients"):
            self._received = set()
            for name, tensor in module.trainable_tensors().items():
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._note, self._received, name))

    @staticmethod
    def _note(received: set[str], name: str, gradient: Tensor) -> None:
        received.add(name)

    def _checksums(self) -> dict[str, float]:
        module: nn.Module = self._module.model
        return buffer_checksums(module, skip=self._module.trainable_tensors().values())

    def check_step(self) -> None:
        """Check the gradients and the base before an optimizer step.

        Raises:
            UserError: If a frozen part of the base changes or is unfrozen, or if a tensor of the
                adapter cannot get a gradient.
        """
        adapter, epoch = self._module.adapter, self._module.current_epoch
        if adapter is not None and self._checked_epoch != epoch:
            self._checked_epoch = epoch  # callbacks unfreeze at the start of an epoch
            adapter.check_frozen()
        if adapter is not None and self._unreached is None:
            check_buffers_unchanged(self._buffers, self._checksums())
        self._check_gradients()

    def _check_gradients(self) -> None:
        """Find trainable tensors without a gradient in the first step.

        Later steps remove those that a gradient has reached. In full fine-tuning, the model may
        have parts that the task does not use.
        """
        module = self._module
        if self._unreached is None:
            without = self._without_gradient()
            self._unreached = set(without)
            if without and module.trainer.is_global_zero:
                why = "it has no rows for them"
                why += ", or the task does not use them" if module.adapter is None else ""
                say(
                    f"the first step gives {len(without)} trainable tensors no gradient, such as "
                    f"{without[0]}: {why}.",
                    file=sys.stderr,
                )
        elif self._unreached:
            self._unreached -= self._with_gradient()

    def _without_gradient(self) -> list[str]:
        if self._module.adapter is not None:
            return self._module.adapter.check_gradients(self._received)
        reached, tensors = self._with_gradient(), self._module.trainable_tensors()
        return [name for name, t in tensors.items() if t.requires_grad and name not in reached]

    def _with_gradient(self) -> set[str]:
        if self._received is not None:
            return self._received
        tensors = self._module.trainable_tensors()
        return {name for name, tensor in tensors.items() if tensor.grad is not None}

    def report_unreached(self) -> None:
        """Print how many trainable tensors never got a gradient, at the end of a training."""
        if self._unreached and self._module.trainer.is_global_zero:
            say(
                f"{len(self._unreached)} trainable tensors never got a gradient, such as "
                f"{min(self._unreached)}: they keep their initial values.",
                file=sys.stderr,
            )
