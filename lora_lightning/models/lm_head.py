"""The head of a language model, at chosen positions alone and never with all its logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.distributed.sharded_loading import gathered, gathers_layers, most
from lora_lightning.lora.functional import refuse_second_derivatives

CHUNK = 2**25
"""Logits that exist at a time: rows x vocabulary; on a GPU of `LARGE_GPU` bytes four times that.

A large vocabulary's head is read once for each chunk, and few rows do not keep a GPU busy.
"""
LARGE_GPU = 40 * 10**9
Inputs = dict[str, Any]


def logits_at(model: nn.Module, inputs: Inputs, places: Tensor) -> Tensor:
    """Logits of chosen positions alone, (count, vocabulary), in the order of `places`.

    The head sees the hidden states of those positions and no others: of a prompt it would cost more
    than a small model's layers do. What the model does to its logits afterwards (soft caps,
    scales, biases) is the model's own code.

    Args:
        model: a language model of transformers, causal or encoder-decoder.
        inputs: arguments of its forward.
        places: (count), at least one: the positions wanted, counted through all rows. As numbers
            and not as a mask, whose size a device would have to be waited for.
    """
    head = _head_of(model)
    if head is None:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[places]  # type: ignore[no-any-return]
    with _before(head, lambda hidden: hidden.flatten(0, 1)[places].unsqueeze(0)):
        return model(**inputs, use_cache=False).logits.squeeze(0)  # type: ignore[no-any-return]


def loss_at(
    model: nn.Module, inputs: Inputs, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy summed over chosen positions, and how many of them are predicted rightly.

    Where there are many, their logits are made, and their gradients with them, some at a time: the
    rest of the backward pass needs the gradient of the hidden states alone. It is the same
    mathematics; that a model's logits are what `_finish` makes of its head's output is compared
    with the model's own once, and where it is not so all logits are made at once.

    Args:
        model: as for `logits_at`.
        inputs: likewise.
        places: likewise.
        targets: (count), token ids, of which -100 counts for nothing.

    Returns:
        Two scalars: the sum, in fp32, and the count; None while the model is training, where
        nobody asks for it.
    """
    head = _head_of(model)
    rows = max(1, _chunk(places.device) // _vocabulary(model))
    in_shares = gathers_layers(model)  # where all processes have to go the same way
    whole = len(targets) <= rows and not in_shares
    if head is None or whole or not _REPLAYED.get(model, True):
        logits = logits_at(model, inputs, places)
        return _cross_entropy(logits, targets), None if model.training else _right(logits, targets)
    found: list[Tensor] = []
    right: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden.flatten(0, 1)[places])
        return found[0][:1].unsqueeze(0)  # the model goes on with one row, as cheap as can be

    with _before(head, keep):
        own = model(**inputs, use_cache=False).logits.squeeze(0)

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = _finish(model, head(hidden))
        if not model.training:
            right.append(_right(logits, wanted))
        return _cross_entropy(logits, wanted)

    learns = torch.is_grad_enabled()  # within a Function it never is
    with gathered(model, head) if in_shares else nullcontext():
        if model not in _REPLAYED:
            with torch.no_grad():
                differs = not _close(_finish(model, head(found[0][:1])), own)
            _REPLAYED[model] = not most(model, int(differs))
        if _REPLAYED[model]:
            trained = [p for p in head.parameters() if learns and p.requires_grad]
            total = _ChunkedLoss.apply(part, rows, targets, found[0], *trained)
            if in_shares:
                # FSDP2 readies the last layers' weights for the backward pass when that reaches
                # what the model has returned.
                total = total + 0 * own.sum()
            return total, torch.stack(right).sum() if right else None
    return loss_at(model, inputs, places, targets)


_REPLAYED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models for which it is known whether `_finish` does to logits what they do."""


def trust_head(model: nn.Module) -> None:
    """Spares a model the comparison with `_finish`: a skeleton has no logits to compare."""
    _REPLAYED[model] = True


def _finish(model: nn.Module, logits: Tensor) -> Tensor:
    """What models do to the output of their heads, by the names that their configs have for it."""
    settings: Any = model.config
    settings = settings.get_text_config()
    scale = getattr(settings, "logit_scale", None)  # Cohere
    if isinstance(scale, (int, float)):
        logits = logits * scale
    divisor = getattr(settings, "logits_scaling", None)  # Granite
    if isinstance(divisor, (int, float)):
        logits = logits / divisor
    cap = getattr(settings, "final_logit_softcapping", None)  # Gemma
    if isinstance(cap, (int, float)):
        logits = torch.tanh(logits / cap) * cap
    return logits


class _ChunkedLoss(torch.autograd.Function):
    """A sum over rows whose gradients are made along with it, so that no chunk's graph is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[Tensor, Tensor], Tensor],
        rows: int,
        targets: Tensor,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[3:]
        total = torch.zeros((), device=hidden.device)
        grads = [torch.zeros_like(tensor) for tensor in trained]
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(any(wanted)):
                states = hidden[chunk].detach().requires_grad_(wanted[0])
                loss = part(states, targets[chunk])
            total += loss.detach()
            if not any(wanted):
                continue
            sources = [states, *trained] if wanted[0] else trained
            found = list(torch.autograd.grad(loss, sources))
            if grad_hidden is not None:
                grad_hidden[chunk] = found.pop(0)
            for grad, more in zip(grads, found, strict=True):
                grad += more
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a loss by chunks", "take that of the logits of a smaller batch")
        grads = (
            None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return None, None, None, *grads


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed loss in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """The number of targets that have the highest logit."""
    return (logits.detach().argmax(-1) == targets).sum()


def _chunk(device: torch.device) -> int:
    """Logits that exist at a time on a device."""
    if device.type == "cuda":
        large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
        return 4 * CHUNK if large else CHUNK
    return CHUNK


def _head_of(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[operator, no-any-return]


def _vocabulary(model: nn.Module) -> int:
    settings: Any = model.config
    return int(settings.get_text_config().vocab_size)


def _close(ours: Tensor, own: Tensor) -> bool:
    error = (ours.float() - own.float()).abs().max()
    return bool(error <= 0.01 * own.float().abs().max())


@contextmanager
def _before(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets a function change what reaches the head."""
    hook = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
