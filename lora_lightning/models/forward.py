"""Forward passes of a loaded model: compilation, packed rows and logits."""

from __future__ import annotations

import inspect
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import UserError

from .private_api import attention_of, is_compiled


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def uses_flash(model: nn.Module | None) -> bool:
    """Return whether the model's attention is a flash kernel other than torch's own."""
    return "flash" in str(attention_of(getattr(model, "config", None)))


def causal_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a causal model from a batch.

    There is no attention mask. Padding is on the right, where no token attends, and attention
    kernels are fastest without a mask.

    With a flash kernel, transformers separates packed rows only in a batch of one row. It then
    searches for their bounds on the device, in every layer. The kernel therefore gets all lanes as
    one row, together with the bounds.
    """
    names = ("input_ids", "position_ids")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    ids = batch["input_ids"]
    if not uses_flash(model) or ("bounds" not in batch and len(ids) > 1):
        return inputs
    inputs = {name: tensor.view(1, -1) for name, tensor in inputs.items()}
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return inputs
    longest = batch.get("longest", ids.shape[1])
    bounds = batch.get("bounds")
    if bounds is None:  # a single row
        bounds = torch.arange(0, longest + 1, longest, dtype=torch.int32, device=ids.device)
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    return inputs | {"max_length_q": longest, "max_length_k": longest}


def compile_layers(model: nn.Module) -> None:
    """Compile each of the model's repeated layers, which then share the same code.

    Raises:
        UserError: If the model has no layers that transformers marks as repeated.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.compile=layer: not supported with a {type(model).__name__}, whose layers "
            "transformers does not mark as repeated. Leave it out."
        )
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
        raise UserError(
            "model.compile=layer: requires a C++ compiler on a CPU, such as g++. Install one, or "
            "leave it out."
        )
    for layer in layers:
        layer.compile(dynamic=True)


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run compiled layers in eager mode, because a growing cache makes them recompile."""
    if any(is_compiled(module) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


@torch.no_grad()
def run_once(model: nn.Module, *, encoder_decoder: bool) -> None:
    """Run a model on one short row, for the setup that it does in its first pass.

    Args:
        model: A transformers model that reads token ids.
        encoder_decoder: Whether its decoder reads separate ids.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    model(input_ids=ids, **({"decoder_input_ids": ids} if encoder_decoder else {}))


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Check that packed rows, separated by position ids, do not attend to each other.

    Call this in the context of training steps, which may change dtypes.

    Raises:
        UserError: If packed rows attend to each other in this model with this attention.
    """
    device = next(model.parameters()).device
    first, second = [3, 4, 5, 6, 7, 8, 9], [8, 7, 6, 5, 4]
    start, stop = len(first), len(second)
    ids = [first + second, second + [0] * start]  # the second lane is padded
    places = [[*range(start), *range(stop)], [*range(stop)] + [0] * start]
    bounds = [0, start, start + stop, start + 2 * stop, 2 * (start + stop)]

    def logits(**batch: Any) -> Tensor:
        inputs = {
            name: torch.tensor(value, device=device) if isinstance(value, list) else value
            for name, value in batch.items()
        }
        shape = inputs["input_ids"].shape
        return model(**causal_inputs(model, inputs), use_cache=False).logits.view(*shape, -1)  # type: ignore[no-any-return]

    def joined(lanes: int) -> Tensor:
        used = torch.tensor(bounds[: 2 * lanes + 1], dtype=torch.int32, device=device)
        return logits(
            input_ids=ids[:lanes], position_ids=places[:lanes], bounds=used, longest=start
        )

    was_training = model.training
    model.eval()
    alone = logits(input_ids=[second])[0]
    leaking = logits(input_ids=ids[:1])[0, start:]
    error: Tensor | float = float("inf")
    if accepts(model, "position_ids"):
        one, two = joined(1), joined(2)
        packed = torch.stack([one[0, start:], two[0, start:], two[1, :stop]])
        error = (packed - alone).abs().max()
    model.train(was_training)
    if not error <= 0.05 * (leaking - alone).abs().max():
        raise UserError(
            f"data.packing=true: not supported by a {type(model).__name__} with attention "
            f"{attention_of(model.config)!r}, where packed rows see each other. Leave it out (for "
            "task=lm also task.blocks=false), or try model.attn_implementation=sdpa or eager."
        )


def classification_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Compute class logits, (rows, classes).

    A decoder is pooled at the last position that the attention mask admits. transformers pools at
    the last token that is not the padding id. This is wrong if the padding id is EOS and the text
    ends with EOS.
    """
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    score = getattr(model, "score", None)
    backbone = getattr(model, str(getattr(model, "base_model_prefix", "")) or "-", None)
    if score is None or backbone is None or backbone is model:
        return model(**inputs).logits  # type: ignore[no-any-return]
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    mask = inputs["attention_mask"]
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return score(hidden[torch.arange(len(last), device=mask.device), last])  # type: ignore[no-any-return]


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
