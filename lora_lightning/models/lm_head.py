"""Language model head at selected positions, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.distributed.parallel_dims import gathers_layers, max_over_ranks
from lora_lightning.distributed.sharded_loading import gathered
from lora_lightning.lora.functional import check_differentiated_once

CHUNK = 2**25
"""Logits in memory at a time, rows x vocabulary.

A GPU with at least `LARGE_GPU` bytes uses four times as many. Each chunk reads the whole head,
which is large for a large vocabulary. Few rows do not keep a GPU busy.
"""
LARGE_GPU = 40 * 10**9
Inputs = dict[str, Any]


def logits_at(model: nn.Module, inputs: Inputs, places: Tensor) -> Tensor:
    """Return the logits of selected positions, (count, vocabulary), in the order of `places`.

    The head sees only the hidden states of those positions. On a whole prompt, it costs more than
    the layers of a small model. The model's own code applies soft caps, scales and biases to the
    logits.

    Args:
        model: A transformers language model, causal or encoder-decoder.
        inputs: Arguments of its forward.
        places: (count), at least one position, numbered through all rows. These are indices and
            not a mask, because the host must wait for the device to learn a mask's count.
    """
    head = _head_of(model)
    if head is None:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[places]  # type: ignore[no-any-return]
    with _before(head, lambda hidden: hidden.flatten(0, 1)[places].unsqueeze(0)):
        return model(**inputs, use_cache=False).logits.squeeze(0)  # type: ignore[no-any-return]


def loss_at(
    model: nn.Module, inputs: Inputs, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy summed over selected positions, and the count of correct ones.

    Many positions are computed in chunks, each with its logits and their gradients. The rest of
    the backward pass needs only the gradient of the hidden states. The result is mathematically
    the same.

    Chunks require that `_finish` turns the head's output into the model's logits. One comparison
    with the model's own logits checks this. If they differ, all logits are computed at once.

    Args:
        model: A transformers language model, causal or encoder-decoder.
        inputs: Arguments of its forward.
        places: (count), positions as in `logits_at`.
        targets: (count), token ids. Positions with -100 are ignored.

    Returns:
        Two scalars, the sum in fp32 and the count. The count is None while the model is training,
        because nothing uses it there.
    """
    head = _head_of(model)
    rows = max(1, _chunk(places.device) // _vocabulary(model))
    sharded = gathers_layers(model)  # then all ranks must take the same path
    one_chunk = len(targets) <= rows and not sharded
    if head is None or one_chunk or not _REPLAYED.get(model, True):
        logits = logits_at(model, inputs, places)
        return _cross_entropy(logits, targets), None if model.training else _right(logits, targets)
    hidden_states: list[Tensor] = []
    right: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        hidden_states.append(hidden.flatten(0, 1)[places])
        return hidden_states[0][:1].unsqueeze(0)  # one row keeps the rest of the forward pass cheap

    with _before(head, keep):
        first_logits = model(**inputs, use_cache=False).logits.squeeze(0)

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = _finish(model, head(hidden))
        if not model.training:
            right.append(_right(logits, wanted))
        return _cross_entropy(logits, wanted)

    learns = torch.is_grad_enabled()  # always False within a Function
    with gathered(model, head) if sharded else nullcontext():
        if model not in _REPLAYED:
            with torch.no_grad():
                differs = not _close(_finish(model, head(hidden_states[0][:1])), first_logits)
            _REPLAYED[model] = not max_over_ranks(model, int(differs))
        if _REPLAYED[model]:
            trained = [p for p in head.parameters() if learns and p.requires_grad]
            total = _ChunkedLoss.apply(part, rows, targets, hidden_states[0], *trained)
            if sharded:
                # FSDP2 prepares the last layers' weights when the backward pass reaches the
                # model's output.
                total = total + 0 * first_logits.sum()
            return total, torch.stack(right).sum() if right else None
    return loss_at(model, inputs, places, targets)


_REPLAYED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether `_finish` reproduces a model's logits, for the models already compared."""


def trust_head(model: nn.Module) -> None:
    """Skip a model's comparison with `_finish`, because fake tensors have no logits to compare."""
    _REPLAYED[model] = True


def _finish(model: nn.Module, logits: Tensor) -> Tensor:
    """Apply to the head's output the scales and caps that the model's config names."""
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
    """Sum over rows that computes its gradients in the forward pass and keeps no chunk's graph."""

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
            chunk_grads = list(torch.autograd.grad(loss, sources))
            if grad_hidden is not None:
                grad_hidden[chunk] = chunk_grads.pop(0)
            for grad, more in zip(grads, chunk_grads, strict=True):
                grad += more
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once("a loss by chunks", "take that of the logits of a smaller batch")
        grads = (
            None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return None, None, None, *grads


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the number of targets that have the highest logit."""
    return (logits.detach().argmax(-1) == targets).sum()


def _chunk(device: torch.device) -> int:
    """Return the number of logits in memory at a time on a device."""
    if device.type == "cuda":
        large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU
        return 4 * CHUNK if large else CHUNK
    return CHUNK


def _head_of(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings()  # type: ignore[operator, no-any-return]


def _vocabulary(model: nn.Module) -> int:
    settings: Any = model.config
    return int(settings.get_text_config().vocab_size)


def _close(ours: Tensor, expected: Tensor) -> bool:
    error = (ours.float() - expected.float()).abs().max()
    return bool(error <= 0.01 * expected.float().abs().max())


@contextmanager
def _before(head: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply a function to the head's input within the block."""
    hook = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
