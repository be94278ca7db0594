"""Adapters on many architectures: PEFT agrees in both directions, and merging changes nothing."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from helpers.architectures import ARCHITECTURES, case
from helpers.asserts import assert_close_in_scale
from helpers.models import randomise
from lora_lightning.lora import (
    UserError,
    load_adapter,
    save_adapter,
)

# PEFT's own "all-linear" trips over DistilBERT's second head.
PEFT_TARGETS = {
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}


def assert_logits_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_adapter_in_peft_gives_the_same_logits(name, tmp_path):
    this = case(name)
    adapter = this.adapter()
    randomise(adapter.named_tensors())
    ours = this.logits(adapter.model)
    assert (ours - this.logits(this.base)).abs().max() > 1e-2
    save_adapter(adapter, tmp_path / "adapter")

    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path / "adapter")
    assert_logits_close(this.logits(theirs), ours)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_adapter_loaded_gives_the_same_logits(name, tmp_path):
    this = case(name)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=PEFT_TARGETS.get(name, "all-linear"),
        task_type=this.task_type,
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(this.copy(), config).eval()
    expected = this.logits(theirs)
    assert (expected - this.logits(this.base)).abs().max() > 1e-2
    theirs.save_pretrained(tmp_path)

    adapter = load_adapter(this.copy(), tmp_path)
    assert_logits_close(this.logits(adapter.model), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapter_attach_train_merge_remove(name):
    """B = 0 is the base; every layer takes part; merging is exact to take back; so is removing."""
    this = case(name)
    model = this.copy()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    base_logits = this.logits(this.base)
    adapter = this.adapter(model)
    assert torch.equal(this.logits(model), base_logits)

    randomise(adapter.named_tensors())
    model(**this.inputs).logits.square().sum().backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    own = adapter.named_tensors()
    assert {id(value) for value in trained.values()} == {id(value) for value in own.values()}
    without = [key for key, value in own.items() if value.grad is None or not value.grad.any()]
    assert without == []

    unmerged = this.logits(model)
    adapted = {key: layer.base_layer.weight for key, layer in adapter.layers.items()}
    values = {key: weight.clone() for key, weight in adapted.items()}
    adapter.merge()
    assert not any(
        torch.equal(layer.base_layer.weight, values[key]) for key, layer in adapter.layers.items()
    )
    assert_close_in_scale(this.logits(model), unmerged)
    adapter.unmerge()
    assert torch.equal(this.logits(model), unmerged)
    for key, layer in adapter.layers.items():
        assert layer.base_layer.weight is adapted[key]
        assert torch.equal(layer.base_layer.weight, values[key])

    adapter.remove()
    assert torch.equal(this.logits(model), base_logits)
    restored = model.state_dict()
    assert list(restored) == list(weights)
    assert all(torch.equal(restored[key], value) for key, value in weights.items())
    flags = {key: value.requires_grad for key, value in this.base.named_parameters()}
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags


def reload(this, model, folder):
    """Writes a model as a Hugging Face folder and reads it again."""
    model.save_pretrained(folder)
    classes = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}
    auto = classes.get(this.task_type, type(model))
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen2", "gemma3", "t5", "mt5", "bart", "bert", "roberta"]
)
def test_merged_model_saved_and_loaded_gives_the_same_logits(name, tmp_path):
    this = case(name)
    adapter = this.adapter()
    randomise(adapter.named_tensors())
    unmerged = this.logits(adapter.model)
    model = adapter.merge_and_unload()
    assert type(model) is type(this.base)
    assert set(model.state_dict()) == set(this.base.state_dict())
    assert_close_in_scale(this.logits(model), unmerged)
    assert_close_in_scale(this.logits(reload(this, model, tmp_path)), unmerged)


@pytest.mark.parametrize(
    ("name", "target", "tied"),
    [
        ("gpt2", "lm_head", "transformer.wte"),
        ("gpt2", "wte", "lm_head"),
        ("qwen2", "embed_tokens", "lm_head"),
        ("gemma3", "lm_head", "model.embed_tokens"),
        ("gemma3", "embed_tokens", "lm_head"),
        ("bloom", "word_embeddings", "lm_head"),
        ("bart", "lm_head", "model.shared"),
    ],
)
def test_merge_and_unload_with_one_tied_side_adapted_unties(name, target, tied, tmp_path):
    this = case(name)
    model = this.copy()
    other = model.get_submodule(tied).weight
    value = other.clone()
    adapter = this.adapter(model, targets=[target])
    randomise(adapter.named_tensors())
    unmerged = this.logits(model)
    assert (unmerged - this.logits(this.base)).abs().max() > 1e-2

    adapter.merge()
    assert_close_in_scale(this.logits(model), unmerged)
    assert model.get_submodule(tied).weight is other
    assert torch.equal(other, value)
    adapter.unmerge()
    assert next(iter(adapter.layers.values())).base_layer.weight is other

    merged = adapter.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    stored = reload(this, merged, tmp_path)
    assert_close_in_scale(this.logits(stored), unmerged)
    assert torch.equal(stored.get_submodule(tied).weight, value)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merge_and_unload_of_always_tied_weights_raises(target):
    this = case("t5")
    model = this.copy()
    adapter = this.adapter(model, targets=[target])
    randomise(adapter.named_tensors())
    unmerged = this.logits(model)
    with pytest.raises(UserError, match="always ties its embeddings"):
        adapter.merge_and_unload()
    assert torch.equal(this.logits(model), unmerged)
    assert model.config.tie_word_embeddings is True


def both_directions(this, targets, folder):
    """An adapter, PEFT's model with it, and their logits; `theirs` holds what PEFT has written."""
    adapter = this.adapter(targets=targets)
    randomise(adapter.named_tensors())
    ours = this.logits(adapter.model)
    save_adapter(adapter, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(this.copy(), folder / "ours")
    assert_logits_close(this.logits(theirs), ours)
    theirs.save_pretrained(folder / "theirs")
    assert_logits_close(this.logits(load_adapter(this.copy(), folder / "theirs").model), ours)
    return adapter, theirs, ours


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt", "bloom", "bert"])
def test_embedding_adapters_round_trip_through_peft(name, tmp_path):
    this = case(name)
    targets = {"gpt2": "wte", "bert": "word_embeddings", "bloom": "word_embeddings"}
    both_directions(this, [targets.get(name, "embed_tokens")], tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "llama"])
def test_embedding_and_head_adapters_round_trip_through_peft(name, tmp_path):
    """Embeddings and output layer each with an update of its own, tied (Qwen, GPT-2) or not."""
    this = case(name)
    targets = ["wte" if name == "gpt2" else "embed_tokens", "lm_head"]
    adapter, theirs, ours = both_directions(this, targets, tmp_path)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    copies = [key for key in stored if key.endswith("base_layer.weight")]
    assert len(copies) == 2  # whole matrices, since lm_head is a name that PEFT knows

    merged = adapter.merge_and_unload()
    assert_close_in_scale(this.logits(merged), ours)
    assert_close_in_scale(this.logits(reload(this, merged, tmp_path / "merged")), ours)
    off = (this.logits(theirs.merge_and_unload()) - ours).abs().max()
    assert (off > 1e-2) == (name != "llama")  # PEFT adds both updates to the one tied matrix


def test_adapted_model_deepcopy_is_independent():
    this = case("llama")
    adapter = this.adapter()
    randomise(adapter.named_tensors())
    expected = this.logits(adapter.model)
    twin = deepcopy(adapter)
    randomise(adapter.named_tensors(), seed=2)
    assert torch.equal(this.logits(twin.model), expected)
    assert not torch.equal(this.logits(adapter.model), expected)
