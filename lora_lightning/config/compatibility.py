"""Checks for conflicts between model and adapter settings, before a model is loaded."""

from __future__ import annotations

from lora_lightning.lora import LoraConfig, UserError

from .schema import ModelConfig


def refuse_combinations(
    model: ModelConfig, lora: LoraConfig | None, *, start_from: str | None, in_shares: bool
) -> None:
    """Check that a base, an adapter and its warm start can be combined.

    Args:
        model: settings of the base.
        lora: settings of the adapter. None means that the whole model is trained.
        start_from: adapter folder, or checkpoint, whose values training starts with.
        in_shares: whether the base is sharded over processes.

    Raises:
        UserError: they cannot be combined.
    """
    _refuse_quantised(model, lora, in_shares=in_shares)
    if lora is not None:
        if in_shares:
            _check_sharded(model, lora)
        _refuse_two_starts(model, lora, start_from)


def _refuse_quantised(model: ModelConfig, lora: LoraConfig | None, *, in_shares: bool) -> None:
    kind = model.quantization
    if kind is None and lora is not None and lora.init == "loftq":
        raise UserError(
            "lora.init=loftq makes up for what quantisation takes away: give "
            "model.quantization=nf4 or int8, or another lora.init."
        )
    if kind is not None and lora is None:
        raise UserError(
            f"model.quantization={kind} freezes the base, and lora=full trains it: leave out "
            "one of them."
        )
    if kind is not None and in_shares:
        raise UserError(
            f"model.quantization={kind} and a base in shares do not go together: use "
            "trainer=ddp, or model.quantization=null."
        )


def _check_sharded(model: ModelConfig, lora: LoraConfig) -> None:
    if lora.bias != "none":
        raise UserError(
            f"lora.bias={lora.bias} would train biases of the base itself, which is sharded. Use "
            "lora.bias=none, or trainer=ddp."
        )
    if model.new_tokens or lora.trainable_token_indices:
        option = "model.new_tokens" if model.new_tokens else "lora.trainable_token_indices"
        raise UserError(
            f"{option} trains rows of the embeddings, and here each process has a share of "
            "them: use trainer=ddp, or leave it out."
        )
    if lora.use_dora or lora.starts_from_weight or lora.init == "eva":
        name = "use_dora=true" if lora.use_dora else f"init={lora.init}"
        raise UserError(
            f"lora.{name} needs whole weights, and here each process has a share of them: use "
            "trainer=ddp, or plain LoRA."
        )
    if lora.target_parameters:
        raise UserError(
            "lora.target_parameters adapts whole parameters, and here each process has a share "
            "of them: use trainer=ddp, or lora.targets alone."
        )


def _refuse_two_starts(model: ModelConfig, lora: LoraConfig, start_from: str | None) -> None:
    if model.new_tokens and lora.trainable_token_indices:
        raise UserError(
            "model.new_tokens and lora.trainable_token_indices both say whose rows are "
            "trained: leave out one of them."
        )
    stored = start_from is not None and not start_from.endswith(".ckpt")
    if lora.starts_from_weight and stored:
        raise UserError(
            f"adapter={start_from} has values of its own to start from, and "
            f"lora.init={lora.init} others. To go on with an adapter that began so, which is "
            "stored as plain LoRA of twice the rank, give lora.init=kaiming "
            f"lora.rank={2 * lora.rank}."
        )
