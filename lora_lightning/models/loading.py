"""Loading of base models from transformers, ready for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_lightning.config.schema import ModelConfig
from lora_lightning.distributed.parallel_dims import ParallelDims
from lora_lightning.distributed.sharded_loading import loading_options, take_whole
from lora_lightning.errors import UserError
from lora_lightning.lora.module_index import head_modules

from .cpu_kernels import prepare_for_cpu
from .fake import build_fake, fakes_models
from .model_config import config_and_kernels, load_model_config
from .quantization import check_weights_quantized, quantization_options, train_in_one_format
from .resolve import reported_failure, resolve
from .tokenizer import grow_embeddings


def load_classifier(
    config: ModelConfig,
    tokenizer: Any,
    labels: list[str],
    shards: ParallelDims | None = None,
    *,
    new_head: bool = False,
) -> tuple[nn.Module, list[str]]:
    """Load a base model with a classification head of one output per label.

    Args:
        config: Settings of the base model.
        tokenizer: Its tokenizer, whose padding token is set in the model's config.
        labels: Class names, in the order of their ids.
        shards: Ranks over which the base is sharded. Defaults to None, an unsharded base.
        new_head: Whether to reinitialize a checkpoint's head, which has other classes. Defaults to
            False.

    Returns:
        The model in train mode, and the names of the modules to train whole. These are the head
        and all modules that the checkpoint had no weights for.
    """
    from transformers import AutoModelForSequenceClassification

    id2label = dict(enumerate(labels))
    random = torch.get_rng_state()
    model, missing = _from_pretrained(
        AutoModelForSequenceClassification,
        config,
        tokenizer,
        shards,
        num_labels=len(labels),
        id2label=id2label,
        label2id={label: index for index, label in id2label.items()},
        ignore_mismatched_sizes=True,
    )
    settings: Any = model.config
    settings.pad_token_id = tokenizer.pad_token_id
    settings.problem_type = "single_label_classification"
    new = _new_modules(model, missing)
    heads = head_modules(model)
    trained = list(dict.fromkeys([*heads, *new]))
    if new_head:
        new += [name for name in heads if name not in new]
    if new_head or shards is not None or any(p.is_cuda for p in model.parameters()):
        # A head's initial values must be the same on all devices. Draw them in the model's order,
        # as transformers does on a CPU.
        torch.set_rng_state(random)
        for name in [name for name, _ in model.named_modules() if name in trained]:
            take_whole(model, name, reinitialize=name in new)
    return model, trained


def load_generator(
    config: ModelConfig, tokenizer: Any, shards: ParallelDims | None = None
) -> nn.Module:
    """Load a causal or encoder-decoder language model in train mode.

    Raises:
        UserError: If the checkpoint is not a language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    seq2seq = getattr(load_model_config(config), "is_encoder_decoder", False)
    model, missing = _from_pretrained(
        AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM, config, tokenizer, shards
    )
    if missing:
        raise UserError(
            f"model.name_or_path={config.name_or_path}: must be a language model, but lacks "
            f"{missing[0]} of a {type(model).__name__}. Choose a decoder or an encoder-decoder."
        )
    settings: Any = model.config
    settings.pad_token_id = tokenizer.pad_token_id
    return model


def _from_pretrained(
    auto_class: Any, config: ModelConfig, tokenizer: Any, shards: ParallelDims | None, **kwargs: Any
) -> tuple[nn.Module, list[str]]:
    """Load the model in train mode, with the names of the parameters its checkpoint lacks."""
    with reported_failure(config.name_or_path, "model"):
        options = {"attn_implementation": config.attn_implementation}
        model_config, without_kernels = config_and_kernels(config)
        if fakes_models():
            model = build_fake(auto_class, model_config, config, kwargs.get("id2label"))
            return _ready_to_train(model, config), []
        source = resolve(config.name_or_path)
        check_weights_quantized(source, model_config, revision=config.revision)
        options |= quantization_options(auto_class, model_config, config)
        sharding = loading_options(
            auto_class,
            model_config,
            shards,
            trust_remote_code=config.trust_remote_code,
        )
        if without_kernels:
            # The file's choice overrides an argument, so pass the config itself. Label arguments
            # then belong in the config.
            for key in ("num_labels", "id2label", "label2id"):
                if key in kwargs:
                    setattr(model_config, key, kwargs.pop(key))
            kwargs["config"] = model_config
        model, info = auto_class.from_pretrained(
            source,
            revision=config.revision,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.trust_remote_code else True,
            output_loading_info=True,
            **{key: value for key, value in options.items() if value is not None},
            **sharding,
            **kwargs,
        )
    absent = set(info["missing_keys"]) | {entry[0] for entry in info.get("mismatched_keys", ())}
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name in absent]
    lost = sum(parameters[name].numel() for name in missing)
    if lost * 2 > sum(parameter.numel() for parameter in parameters.values()):
        raise UserError(
            f"model.name_or_path={config.name_or_path}: lacks most weights of a "
            f"{type(model).__name__} ({len(missing)} tensors, such as {missing[0]}). Choose "
            "another model."
        )
    if config.new_tokens:
        grow_embeddings(model, tokenizer)
    return _ready_to_train(model, config), missing


def _ready_to_train(model: Any, config: ModelConfig) -> nn.Module:
    train_in_one_format(model)
    if config.cpu_kernels and not torch.cuda.is_available():
        prepare_for_cpu(model, checkpoints=config.gradient_checkpointing)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # from_pretrained returns eval mode, which silently disables dropout
    return model  # type: ignore[no-any-return]


def _new_modules(model: nn.Module, missing: list[str]) -> list[str]:
    """Return the largest modules with all parameters missing in the checkpoint."""
    absent = set(missing)
    new: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in new):
            continue
        parameters = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        if parameters and absent.issuperset(parameters):
            new.append(name)
    return new
