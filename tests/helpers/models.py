"""Tokenizers of tiny models, adapters on them, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from helpers.data import WORDS
from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora import Adapter, LoraConfig
from lora_lightning.models.loading import load_generator

IDS = torch.arange(3, 15).view(2, 6)
"""Token ids of two rows, which every tiny model knows."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} : {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


def word_tokenizer(specials: list[str], **kwargs):
    """Return a tokenizer of words, whose first tokens are the special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: index for index, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=specials[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in kwargs:
        first, last = kwargs["cls_token"], kwargs["sep_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(first, vocab[first]), (last, vocab[last])],
        )
    else:
        bos = kwargs["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **kwargs)


def load_llama(folder: Path, quantization: str | None = None) -> nn.Module:
    """Load a causal model with fp32 weights, or quantized ones, as a run does."""
    config = ModelConfig(str(folder), quantization=quantization, dtype="float32")
    return load_generator(config, AutoTokenizer.from_pretrained(folder)).eval()


def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    """Return the logits of a model without gradients."""
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def adapter_on(model: nn.Module, **settings) -> Adapter:
    """Return an adapter of rank 3 and alpha 6, unless the settings say otherwise."""
    return Adapter(model, LoraConfig(**{"rank": 3, "alpha": 6, **settings}))


def random_adapter_on(model: nn.Module, *, seed: int = 1, std: float = 0.1, **settings) -> Adapter:
    """Return an adapter whose tensors are all random."""
    adapter = adapter_on(model, **settings)
    randomise(adapter.named_tensors(), seed, std)
    return adapter


def randomise(tensors: dict[str, Tensor], seed: int = 1, std: float = 0.1) -> None:
    """Give the tensors of an adapter values that no initialization gives, reproducibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def trainable(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors that an optimizer changes, without initial values to be subtracted."""
    return {name: t for name, t in adapter.named_tensors().items() if t.requires_grad}
