"""Quantised bases: LoRA on them is LoRA on the dense weights that they stand for."""

from __future__ import annotations

import importlib.util
import json
import shutil

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from helpers.models import IDS, load_llama, logits
from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    save_adapter,
)
from lora_lightning.lora.initialization.loftq import initialize_loftq, weight_of
from lora_lightning.lora.layers.base import dequantized
from lora_lightning.models.loading import load_classifier
from lora_lightning.models.quantization import note_on_experts
from lora_lightning.tasks.language_modeling import LanguageModelTask
from lora_lightning.training.module import LoraModule

KINDS = ("nf4", "int8")


def dense_twin(model, folder) -> nn.Module:
    """The unquantised model with the values that the quantised weights stand for."""
    twin = load_llama(folder)
    with torch.no_grad():
        for name, module in twin.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(dequantized(model.get_submodule(name)))
    return twin


def adapted(model, **settings) -> Adapter:
    adapter = Adapter(model, LoraConfig(rank=3, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.named_tensors().values():
            if tensor.requires_grad and tensor.dim() == 2:
                tensor.normal_(std=0.1)
    return adapter


def gradients(adapter) -> dict[str, torch.Tensor]:
    adapter.model.zero_grad()
    adapter.model.train()
    adapter.model(input_ids=IDS).logits.square().mean().backward()
    adapter.model.eval()
    return {name: t.grad.clone() for name, t in adapter.named_tensors().items() if t.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_quantized_base_computes_lora_on_dequantized_weights(kind, settings, tiny_llama):
    """Logits and gradients; those after an evaluation too, in which nothing may be repacked."""
    model = load_llama(tiny_llama, kind)
    twin = dense_twin(model, tiny_llama)
    assert not torch.equal(logits(twin), logits(load_llama(tiny_llama)))
    ours, truth = (adapted(base, **settings) for base in (model, twin))
    before = gradients(ours)
    # int8 takes its inputs in 8 bits in evaluation, by the library's design
    close = {"rtol": 1e-4, "atol": 1e-4} if kind == "nf4" else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(logits(model), logits(twin), **close)
    expected = gradients(truth)
    for found in (before, gradients(ours)):
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base_with_pissa_keeps_its_outputs(kind, tiny_llama):
    """PiSSA's part is that of the dequantised weight, and the model is what it was."""
    model = load_llama(tiny_llama, kind)
    base = logits(model)
    adapter = Adapter(model, LoraConfig(rank=3, init="pissa"))
    torch.testing.assert_close(logits(model), base, rtol=1e-3, atol=1e-3)
    layer = next(iter(adapter.layers.values()))
    weight = dequantized(layer.base_layer).double()
    u, s, vt = torch.linalg.svd(weight)
    part = layer.scaling * layer.first_B.double() @ layer.first_A.double()
    torch.testing.assert_close(part, u[:, :3] * s[:3] @ vt[:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base_with_an_adapter_equals_peft(kind, tiny_llama, tmp_path):
    model = load_llama(tiny_llama, kind)
    adapter = adapted(model)
    save_adapter(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(load_llama(tiny_llama, kind), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "least", "most"), [("nf4", 0.12, 0.16), ("int8", 0.24, 0.28)])
def test_quantized_weights_take_the_bytes_of_their_format(kind, least, most, tiny_llama):
    """Of the linear layers: 4 bits or 8 of 32; heads as they were."""

    def size(model) -> float:
        return sum(
            p.numel() * p.element_size()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lm_head" not in name
            for p in module.parameters()
        )

    model = load_llama(tiny_llama, kind)
    assert least < size(model) / size(load_llama(tiny_llama)) < most
    assert type(model.lm_head) is nn.Linear
    whole = sum(p.numel() for p in load_llama(tiny_llama).parameters())
    adapter = Adapter(model, LoraConfig(rank=1))
    assert adapter.summary().total - adapter.summary().trainable == whole
    with pytest.raises(UserError, match="its weight is quantized"):
        adapter.merge()


def test_note_on_experts_names_their_dtype(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_llama(tmp_path, "nf4").requires_grad_(False)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["gate_up_proj"] == kinds["down_proj"] == torch.float32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    assert "The weights of experts stay float32" in note_on_experts(model)
    assert note_on_experts(load_llama(tiny_llama, "nf4").requires_grad_(False)) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_base_leaves_its_new_head_in_full_precision(kind, tiny_bert):
    config = ModelConfig(str(tiny_bert), quantization=kind)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model, whole = load_classifier(config, tokenizer, ["a", "b"])
    assert type(model.classifier) is nn.Linear
    assert type(model.bert.encoder.layer[0].attention.self.query) is not nn.Linear
    Adapter(model, LoraConfig(modules_to_save=whole))


def test_quantization_without_bitsandbytes_is_refused(tiny_llama, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(UserError, match=r'pip install "lora_lightning\[quant\]"'):
        load_llama(tiny_llama, "nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@torch.no_grad()
def test_loftq_starts_nearer_to_the_original_weights(kind, model, request):
    """By r singular values of what is missing, as Eckart and Young have it."""
    folder = request.getfixturevalue(model)
    original, quantised = load_llama(folder), load_llama(folder, kind)
    adapter = Adapter(quantised, LoraConfig(rank=3, alpha=5))
    initialize_loftq(adapter, original)
    for name, layer in adapter.layers.items():
        weight = weight_of(original.get_submodule(name)).double()
        missing = weight - layer.dense_weight().double()
        left = missing - layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        singular = torch.linalg.svdvals(missing)
        assert left.norm() == pytest.approx(float(singular[3:].norm()), rel=1e-3)
        assert left.norm() < 0.95 * missing.norm()


@pytest.fixture(scope="module")
def tiny_gpt2(tiny_llama, tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny_gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ).save_pretrained(folder)
    return folder


def test_loftq_loads_the_original_base_on_the_cpu(tiny_llama, monkeypatch):
    """A GPU, which "meta" stands for, may have no room for it beside the quantised one."""

    def build_model(task, config, tokenizer, shards=None):
        built.append((config.quantization, torch.get_default_device().type))
        return LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)), []

    built: list[tuple[str | None, str]] = []
    monkeypatch.setattr(LanguageModelTask, "build_model", build_model)
    module = LoraModule(
        LanguageModelTask(),
        ModelConfig(str(tiny_llama), quantization="nf4"),
        LoraConfig(init="loftq"),
    )
    with torch.device("meta"):
        module.configure_model()
    assert built == [("nf4", "meta"), (None, "cpu")]
    assert next(iter(module.adapter.layers.values())).lora_A.is_meta


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_base_with_a_quantization_config_requires_quantized_weights(shards, tiny_llama, tmp_path):
    """And not because its config says so; what was saved quantised is loaded so."""
    asks = load_llama(tiny_llama, "nf4")
    asks.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "saved")
    model = load_llama(tmp_path / "saved")
    torch.testing.assert_close(logits(model), logits(asks))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    load_llama(tiny_llama).save_pretrained(tmp_path / "plain", max_shard_size=shards)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "plain")
    for kind in (None, "int8"):
        with pytest.raises(UserError, match=r"layers \(bitsandbytes\), but the weights are not"):
            load_llama(tmp_path / "plain", kind)


def test_base_folder_with_an_adapter_is_refused(tiny_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    save_adapter(adapted(load_llama(tiny_llama)), tmp_path / "adapter")
    for path in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, base)
    with pytest.raises(UserError, match="holds an adapter, which would"):
        load_llama(base)
