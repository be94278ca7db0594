"""What is done to a model as a whole: compiled layers, offloaded activations, checkpointing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from lora_lightning.forward import compile_layers, offloaded_activations, uncompiled
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.module import LoraModule
from lora_lightning.parallel import loading_options
from lora_lightning.settings import ModelConfig
from lora_lightning.tasks import build_task


def module_of(folder, **settings) -> LoraModule:
    """A module whose B is away from zero, so that A gets a gradient."""
    task = build_task({"name": "summarization"})
    module = LoraModule(
        task, ModelConfig(name_or_path=str(folder), **settings), LoraConfig(rank=4, alpha=8)
    )
    module.configure_model()
    generator = torch.Generator().manual_seed(5)
    for layer in module.adapter.layers.values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return module


def gradients(module: LoraModule, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(4, 40, (2, length), generator=torch.Generator().manual_seed(length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    module.zero_grad()
    loss = module.training_loss(batch)
    loss.backward()
    return loss.detach(), {name: t.grad for name, t in module.trainable_tensors().items()}


def assert_same(module: LoraModule, reference: LoraModule, length: int) -> None:
    expected_loss, expected = gradients(reference, length)
    loss, found = gradients(module, length)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_same_gradients(tiny_llama):
    assert_same(module_of(tiny_llama, gradient_checkpointing=True), module_of(tiny_llama), length=9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_give_the_same_gradients(tiny_llama, checkpointing):
    module = module_of(tiny_llama, offload_activations=True, gradient_checkpointing=checkpointing)
    assert_same(module, module_of(tiny_llama), length=9)


class Copies(TorchDispatchMode):
    """Notes the shapes of tensors that are copied into others."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.shapes.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


def test_activations_are_offloaded_and_parameters_are_not():
    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5, requires_grad=True)
    with Copies() as copies, offloaded_activations():
        layer(x).relu()
    assert sorted(copies.shapes) == [(4, 3), (4, 5)]  # what relu gave, and x; not the weight


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_at_all_lengths(tiny_llama):
    module = module_of(tiny_llama, compile="layer")
    reference = module_of(tiny_llama)
    layers = [m for m in module.model.modules() if m._compiled_call_impl is not None]
    assert len(layers) == len(reference.model.model.layers)
    for length in (9, 14, 23):
        assert_same(module, reference, length)
    prompts = [[5, 6, 7], [8, 9]]
    texts = [
        this.task.generate(this.model, prompts, max_new_tokens=5) for this in (module, reference)
    ]
    assert texts[0] == texts[1]


def test_uncompiled_models_are_left_alone(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    Adapter(model, LoraConfig(rank=2))
    assert type(uncompiled(model)).__name__ == "nullcontext"


def test_a_model_without_layers_to_compile():
    with pytest.raises(UserError, match=r"model.compile=layer: a Sequential has no layers"):
        compile_layers(nn.Sequential(nn.Linear(2, 2)))


def test_only_layers_can_be_compiled():
    with pytest.raises(UserError, match="model.compile must be layer or null, got 'all'"):
        ModelConfig(compile="all")


def _shards(data: int, tensor: int) -> SimpleNamespace:
    return SimpleNamespace(data=data, tensor=tensor, mesh=SimpleNamespace(device_type="cpu"))


@pytest.mark.parametrize(("heads", "pairs"), [(3, 3), (4, 1)])
def test_heads_that_cannot_be_cut_are_told(heads, pairs):
    """transformers would cut the matrices all the same, and fail in the first step."""
    config = LlamaConfig(
        hidden_size=heads * 8, num_attention_heads=heads, num_key_value_heads=pairs, vocab_size=64
    )
    with pytest.raises(UserError, match=r"_heads is \d, which cannot be cut evenly"):
        loading_options(AutoModelForCausalLM, config, _shards(1, 2))
    assert loading_options(AutoModelForCausalLM, config, _shards(1, 1)) == {}


def test_an_encoders_layers_are_gathered_each_for_itself():
    """transformers has no plan of its own for BERT: it would gather the whole model at once."""
    config = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3)
    shards = _shards(2, 1)
    options = loading_options(AutoModelForSequenceClassification, config, shards)
    assert list(options["distributed_config"].fsdp_plan) == ["bert.encoder.layer.*"]
