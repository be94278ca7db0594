"""Checks for conflicts between model and adapter settings, before a model is loaded."""

from __future__ import annotations

from lora_lightning.lora import LoraConfig, UserError

from .schema import ModelConfig


def check_combinations(
    model: ModelConfig, lora: LoraConfig | None, *, start_from: str | None, sharded: bool
) -> None:
    """Check that a base, an adapter and its warm start can be combined.

    Args:
        model: settings of the base.
        lora: settings of the adapter. None means that the whole model is trained.
        start_from: adapter folder, or checkpoint, whose values training starts with.
        sharded: whether the base is sharded over processes.

    Raises:
        UserError: they cannot be combined.
    """
    _check_quantized(model, lora, sharded=sharded)
    if lora is not None:
        if sharded:
            _check_sharded(model, lora)
        _check_start(model, lora, start_from)


def _check_quantized(model: ModelConfig, lora: LoraConfig | None, *, sharded: bool) -> None:
    kind = model.quantization
    if kind is None and lora is not None and lora.init == "loftq":
        raise UserError(
            "lora.init=loftq: requires model.quantization=nf4 or int8, whose error it compensates."
        )
    if kind is not None and lora is None:
        raise UserError(
            f"model.quantization={kind}: not supported with lora=full, which trains the base. "
            "Remove one of the two."
        )
    if kind is not None and sharded:
        raise UserError(
            f"model.quantization={kind}: not supported with a sharded base. Use trainer=ddp, or "
            "model.quantization=null."
        )


def _check_sharded(model: ModelConfig, lora: LoraConfig) -> None:
    if lora.bias != "none":
        raise UserError(
            f"lora.bias={lora.bias}: not supported with a sharded base, whose biases it trains. "
            "Use lora.bias=none, or trainer=ddp."
        )
    if model.new_tokens or lora.trainable_token_indices:
        option = "model.new_tokens" if model.new_tokens else "lora.trainable_token_indices"
        raise UserError(
            f"{option}: not supported with a sharded base, whose embeddings it trains. Use "
            f"trainer=ddp, or remove {option}."
        )
    if lora.use_dora or lora.starts_from_weight or lora.init == "eva":
        name = "use_dora=true" if lora.use_dora else f"init={lora.init}"
        raise UserError(
            f"lora.{name}: not supported with a sharded base, because it requires whole weights. "
            "Use trainer=ddp, or plain LoRA."
        )
    if lora.target_parameters:
        raise UserError(
            "lora.target_parameters: not supported with a sharded base, because it adapts whole "
            "parameters. Use trainer=ddp, or lora.targets alone."
        )


def _check_start(model: ModelConfig, lora: LoraConfig, start_from: str | None) -> None:
    if model.new_tokens and lora.trainable_token_indices:
        raise UserError(
            "model.new_tokens: not supported with lora.trainable_token_indices, because both set "
            "which rows are trained. Remove one of the two."
        )
    stored = start_from is not None and not start_from.endswith(".ckpt")
    if lora.starts_from_weight and stored:
        raise UserError(
            f"lora.init={lora.init}: not supported with adapter={start_from}, whose values "
            "training starts with. For an adapter that began so, which is stored as plain LoRA of "
            f"twice the rank, use lora.init=kaiming lora.rank={2 * lora.rank}."
        )
