"""Trained rows of a vocabulary: against PEFT, against plain torch, and what they leave alone."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from helpers.architectures import VOCABULARY, case
from helpers.models import logits, randomise
from lora_lightning.lora import (
    Adapter,
    AdapterSet,
    LoraConfig,
    UserError,
    grow,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora.layers.trainable_tokens import rows_of_tokens
from lora_lightning.models.fingerprint import fingerprint
from lora_lightning.models.lm_head import loss_at

NEW = [VOCABULARY + 2, VOCABULARY, VOCABULARY + 1]
ROWS = VOCABULARY + 3
DELTA = "token_adapter.trainable_tokens_delta"
FIRST = {
    "llama": "model.embed_tokens",
    "qwen2": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "gemma3": "model.embed_tokens",
    "bart": "model.shared",
    "t5": "shared",
    "bert": "bert.embeddings.word_embeddings",
}
"""The input embedding by model. Llama's output layer is its own; those of the others are tied."""


def inputs_of(this):
    """Inputs with new tokens among the others, on both sides of an encoder-decoder."""
    found = {name: tensor.clone() for name, tensor in this.inputs.items()}
    for name in found.keys() & {"input_ids", "decoder_input_ids"}:
        found[name][0, 1], found[name][1, 2], found[name][1, 4] = NEW
    return found


def logits_of(this, model):
    inputs = inputs_of(this)
    return logits(model, inputs.pop("input_ids"), **inputs)


def grown(this, rows=ROWS):
    model = this.copy()
    grow(model, rows)
    return model


def with_rows(model, **settings):
    indices = rows_of_tokens(model, NEW)
    adapter = Adapter(model, LoraConfig(rank=2, trainable_token_indices=indices, **settings))
    randomise(adapter.named_tensors())
    return adapter


# Against PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_saved_rows_in_peft_give_the_same_logits(name, tmp_path):
    this = case(name)
    adapter = with_rows(grown(this))
    save_adapter(adapter, tmp_path)
    expected = logits_of(this, adapter.model)
    base = this.copy()
    base.resize_token_embeddings(ROWS)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits_of(this, theirs), expected, rtol=0, atol=1e-6)
    loaded = load_adapter(this.copy(), tmp_path)
    assert torch.equal(logits_of(this, loaded.model), expected)


@pytest.mark.parametrize("name", FIRST)
def test_saved_rows_are_the_new_rows_only(name, tmp_path):
    adapter = with_rows(grown(case(name)))
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    rows = {n: t.shape for n, t in tensors.items() if "lora_" not in n}
    dim = adapter.model.get_input_embeddings().weight.shape[1]
    named = [FIRST[name], *(["lm_head"] if name == "llama" else [])]
    assert rows == {f"base_model.model.{n}.{DELTA}": (3, dim) for n in named}
    asked = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert asked == {n.rpartition(".")[2]: NEW for n in named}
    header = 8 + int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    low_rank = sum(t.numel() for n, t in tensors.items() if "lora_" in n)
    assert size == header + 4 * (low_rank + len(named) * 3 * dim)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", FIRST)
def test_peft_rows_loaded_give_the_same_logits(name, by_name, tmp_path):
    this = case(name)
    base = this.copy()
    base.resize_token_embeddings(ROWS)
    indices = dict.fromkeys(rows_of_tokens(base, NEW), NEW) if by_name else NEW
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        trainable_token_indices=indices,
        ensure_weight_tying=name in ("qwen2", "gpt2"),
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for tensor_name, tensor in theirs.named_parameters():
            if DELTA in tensor_name:
                tensor.normal_()
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(this.copy(), tmp_path)
    if name == "llama" and not by_name:  # PEFT's other new rows are drawn, and it stores them not
        output = loaded.model.lm_head.weight
        output.data.copy_(base.get_output_embeddings().weight.data)
    torch.testing.assert_close(
        logits_of(this, loaded.model), logits_of(this, theirs), rtol=1e-6, atol=5e-6
    )


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_peft_rows_with_the_whole_matrix_load(name, tmp_path):
    """PEFT writes it where it finds the base in a folder; here some new rows are not trained."""
    this = case(name)
    this.base.save_pretrained(tmp_path / "base")
    base = type(this.base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(ROWS, pad_to_multiple_of=8)
    indices = rows_of_tokens(base, NEW)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.shape == (64, 32) for t in tensors.values()) == 2
    loaded = load_adapter(this.copy(), tmp_path / "adapter")
    assert loaded.model.config.vocab_size == 64
    torch.testing.assert_close(
        logits_of(this, loaded.model), logits_of(this, theirs), rtol=1e-6, atol=1e-6
    )
    other = this.copy()
    other.get_input_embeddings().weight.data[5] += 0.1
    with pytest.raises(
        UserError, match=r"embed_tokens.* differs from the base model's.*another base"
    ):
        load_adapter(other, tmp_path / "adapter")


def test_peft_tied_update_raises(tmp_path):
    this = case("qwen2")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    peft.get_peft_model(this.copy(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "ensure_weight_tying": True}))
    with pytest.raises(UserError, match="ensure_weight_tying=True is not supported"):
        load_adapter(this.copy(), tmp_path)


# Against plain torch -------------------------------------------------------------------------


def losses(model, inputs):
    places = torch.arange(inputs["input_ids"].numel())
    targets = inputs["input_ids"].flatten().roll(-1)
    return loss_at(model, inputs, places, targets)[0]


def plain_losses(model, inputs):
    output = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(output, inputs["input_ids"].flatten().roll(-1), reduction="sum")


@pytest.mark.parametrize("chunk", [2**25, 3 * ROWS])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gemma3"])
def test_training_rows_equals_masked_training_of_the_matrix(name, chunk, monkeypatch):
    """In float64, by Adam: everything frozen but the rows of the new tokens."""
    monkeypatch.setattr("lora_lightning.models.lm_head.CHUNK", chunk)
    this = case(name)
    inputs = inputs_of(this)
    model, plain = grown(this).double(), grown(this).double().requires_grad_(False)
    adapter = Adapter(model, LoraConfig(rank=2, trainable_token_indices=rows_of_tokens(model, NEW)))
    rows = [layer.rows for layer in adapter.token_rows.values()]
    adapter_only = torch.optim.Adam(list(dict.fromkeys(rows)), lr=0.05)
    ends = (plain.get_input_embeddings(), plain.get_output_embeddings())
    matrices = list(dict.fromkeys(end.weight.requires_grad_(True) for end in ends))
    whole = torch.optim.Adam(matrices, lr=0.05)
    before = [matrix.detach().clone() for matrix in matrices]
    for _ in range(4):
        loss, expected = losses(model, inputs), plain_losses(plain, inputs)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        loss.backward()
        expected.backward()
        for matrix in matrices:
            matrix.grad[:VOCABULARY] = 0.0
        for optimizer in (adapter_only, whole):
            optimizer.step()
            optimizer.zero_grad()
    for layer in adapter.token_rows.values():
        tied_to = matrices[-1] if isinstance(layer.base_layer, nn.Linear) else matrices[0]
        torch.testing.assert_close(layer.rows.detach(), tied_to.detach()[NEW], rtol=1e-5, atol=1e-5)
        assert layer.base_layer.weight.grad is None
    merged = adapter.merge_and_unload()
    for end, was in zip((merged.get_input_embeddings(), merged.lm_head), before * 2, strict=False):
        assert torch.equal(end.weight[:VOCABULARY], was[:VOCABULARY])
        assert not torch.isclose(end.weight[NEW], was[NEW]).all(dim=1).any()


def test_token_rows_copy_no_matrix():
    """Neither for autograd, nor as a gradient, nor while it computes: PEFT's takes several."""
    this = case("llama")
    model = grown(this, 20_000).bfloat16()
    with_rows(model)
    base = model.lm_head.base_layer.weight
    saved: list[int] = []

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter) and tensor._base is not base:
            saved.append(tensor.numel())
        return tensor

    hidden = torch.randn(1, 2, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedded = model.model.embed_tokens(torch.tensor([[3, NEW[0]]]))
        output = model.lm_head(hidden)
    assert max(saved) <= 4 * 32
    (embedded.float().sum() + output.float().sum()).backward()
    assert model.lm_head.base_layer.weight.grad is None
    assert model.lm_head.rows.grad.dtype == torch.float32
    assert embedded.dtype == output.dtype == torch.bfloat16


# On and off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_token_rows_merge_and_remove(name, tmp_path):
    this = case(name)
    base = logits_of(this, grown(this))
    adapter = with_rows(grown(this))
    unmerged = logits_of(this, adapter.model)
    with adapter.disabled():
        assert torch.equal(logits_of(this, adapter.model), base)
    adapter.merge()
    torch.testing.assert_close(logits_of(this, adapter.model), unmerged, rtol=0, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(logits_of(this, adapter.model), base)
    adapter.unmerge()
    assert torch.equal(logits_of(this, adapter.model), unmerged)
    merged = adapter.merge_and_unload()
    assert set(merged.state_dict()) == set(this.base.state_dict())
    merged.save_pretrained(tmp_path)
    stored = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(this, stored), unmerged, rtol=0, atol=1e-5)
    assert stored.config.vocab_size == ROWS
    assert stored.config.tie_word_embeddings == this.base.config.tie_word_embeddings

    model = with_rows(grown(this)).remove()
    assert torch.equal(logits_of(this, model), base)
    assert not any("token_adapter" in key for key in model.state_dict())


def test_merge_of_diverged_rows_raises():
    adapter = with_rows(grown(case("llama")))
    adapter.token_rows["lm_head"].rows.data[0, 0] = math.nan
    with pytest.raises(UserError, match="lm_head: a trained row is not finite"):
        adapter.merge()
    assert not any(layer.merged for layer in adapter.token_rows.values())


def test_adapter_set_on_a_grown_base_serves_each_adapter(tmp_path):
    this = case("qwen2")
    expected = {}
    for number in range(2):
        adapter = with_rows(grown(this), targets=["q_proj"] if number else "all-linear")
        randomise(adapter.named_tensors(), seed=number)
        save_adapter(adapter, tmp_path / str(number))
        expected[str(number)] = logits_of(this, adapter.model)
    with pytest.raises(UserError, match="requires 64 vocabulary rows, but the shared base has 61"):
        AdapterSet(this.copy()).add("0", tmp_path / "0")
    base = grown(this)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded = AdapterSet(base)
    for name in expected:
        loaded.add(name, tmp_path / name)
    together = loaded(["1", "0"], **inputs_of(this)).logits
    for row, name in enumerate(["1", "0"]):
        torch.testing.assert_close(together[row], expected[name][row], rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


# Growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gptj", "bart", "t5"])
def test_grow_adds_mean_rows_and_never_shrinks(name):
    this = case(name)
    random = torch.get_rng_state()
    model, again = grown(this), grown(this)
    assert torch.equal(torch.get_rng_state(), random)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        for leaf, old in getattr(this.base, end)().named_parameters():
            new = getattr(getattr(model, end)(), leaf)
            assert torch.equal(new[:VOCABULARY], old)
            mean = old.double().mean(0).float()
            for row in new[VOCABULARY:]:
                torch.testing.assert_close(row, mean, rtol=0, atol=1e-6)
            assert torch.equal(new, getattr(getattr(again, end)(), leaf))
    assert model.config.vocab_size == ROWS
    grow(model, 10)
    assert model.get_input_embeddings().weight.shape[0] == ROWS
    before = this.logits(this.base)
    torch.testing.assert_close(this.logits(model)[..., :VOCABULARY], before, rtol=0, atol=1e-6)


def test_rows_of_known_tokens_start_at_their_values():
    this = case("qwen2")
    model = this.copy()
    adapter = Adapter(model, LoraConfig(rank=2, trainable_token_indices=[7, 3]))
    assert torch.equal(adapter.token_rows["lm_head"].rows, this.base.lm_head.weight[[7, 3]])
    torch.testing.assert_close(this.logits(model), this.logits(this.base), rtol=0, atol=1e-6)
    assert "2 rows" in str(adapter.summary())
    low_rank = sum(row.parameters for row in adapter.summary().rows)
    assert adapter.summary().trainable == low_rank + 2 * 32


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "llama",
            {"trainable_token_indices": [99]},
            "index 99 is not in model.embed_tokens, which has 61 rows",
        ),
        ("llama", {"trainable_token_indices": {"embed_tokes": [1]}}, "Did you mean 'embed_tokens'"),
        ("llama", {"trainable_token_indices": {"norm": [1]}}, "LlamaRMSNorm, has no rows"),
        ("llama", {"trainable_token_indices": [1, 1]}, "each once"),
        (
            "llama",
            {"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}},
            "two entries for model.embed_tokens have different indices",
        ),
        ("llama", {"trainable_token_indices": []}, "must be a list of token ids"),
        ("llama", {"trainable_token_indices": {"lm_head": [-1]}}, "must be a list of token ids"),
        (
            "qwen2",
            {"trainable_token_indices": {"lm_head": [1]}},
            "Set the indices of the input embedding",
        ),
        (
            "qwen2",
            {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}},
            "share one matrix and its rows",
        ),
        (
            "llama",
            {"trainable_token_indices": [1], "targets": ["embed_tokens"]},
            "lora.targets: not supported on model.embed_tokens, whose rows",
        ),
        (
            "qwen2",
            {"trainable_token_indices": [1], "modules_to_save": ["lm_head"]},
            "lora.modules_to_save: not supported on lm_head, whose rows",
        ),
        (
            "gptj",
            {"trainable_token_indices": {"lm_head": [1]}, "bias": "all"},
            "lora.bias=all: not supported on lm_head, whose rows",
        ),
    ],
)
def test_token_indices_that_are_invalid_raise(name, settings, message):
    model = case(name).copy()
    with pytest.raises(UserError, match=message):
        Adapter(model, LoraConfig(rank=2, **settings))
    assert all(type(m).__module__.split(".")[0] != "lora_lightning" for m in model.modules())


def test_fingerprint_of_a_grown_base_is_unchanged():
    from lora_lightning.lora.embeddings import before_growth

    this = case("llama")

    def of(model):
        shorter = before_growth(model)
        return fingerprint((name, shorter.get(p, p)) for name, p in model.named_parameters())

    assert of(this.copy()) == of(grown(this)) == of(grown(this, 99)) == of(grown(this).bfloat16())
    other = grown(this)
    other.model.embed_tokens.weight.data += 0.1
    assert of(other) != of(grown(this))
