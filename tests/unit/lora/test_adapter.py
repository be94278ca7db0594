"""An adapter in place: what it trains, switching it off, merging all or nothing, whole modules."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from helpers.architectures import case
from helpers.models import adapter_on, randomise
from lora_lightning.lora import (
    UserError,
    load_adapter,
    save_adapter,
)


def trainable_names(model) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_adapter_disabled_equals_the_base(bias, merged):
    this = case("bert")
    base = this.logits(this.base)
    adapter = adapter_on(this.copy(), bias=bias, modules_to_save=["classifier"])
    randomise(adapter.named_tensors())
    trained = {name: value.clone() for name, value in adapter.named_tensors().items()}
    if merged:
        adapter.merge()
    adapted = this.logits(adapter.model)
    assert not torch.allclose(adapted, base)
    for _ in range(2):
        with adapter.disabled():
            assert torch.equal(this.logits(adapter.model), base)
    assert torch.equal(this.logits(adapter.model), adapted)
    assert all(layer.merged is merged for layer in adapter.layers.values())
    with pytest.raises(RuntimeError, match="stop"), adapter.disabled():
        raise RuntimeError("stop")
    assert torch.equal(this.logits(adapter.model), adapted)
    assert all(torch.equal(value, trained[name]) for name, value in adapter.named_tensors().items())

    adapter.remove()
    assert torch.equal(this.logits(adapter.model), base)
    restored, before = adapter.model.state_dict(), this.base.state_dict()
    assert all(torch.equal(restored[name], value) for name, value in before.items())


@pytest.mark.parametrize("merged", [False, True])
def test_adapter_set_enabled_switches_updates(merged):
    this = case("llama")
    adapter = adapter_on(this.copy())
    randomise(adapter.named_tensors())
    adapted = this.logits(adapter.model)
    if merged:
        adapter.merge()
    adapter.set_enabled(False)
    assert torch.equal(this.logits(adapter.model), this.logits(this.base))
    adapter.set_enabled(True)
    assert torch.equal(this.logits(adapter.model), adapted)


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "bart", "t5", "qwen2"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_adapter_trainable_parameters_equal_peft(name, bias):
    this = case(name)
    targets = {
        "bert": ["query", "output.dense"],
        "gpt2": ["c_attn"],
        "t5": ["q", "wo"],
    }.get(name, ["q_proj", "v_proj"])
    whole = {"bert": ["classifier"]}.get(name, [])
    adapter = adapter_on(this.copy(), targets=targets, bias=bias, modules_to_save=whole)
    config = peft.LoraConfig(r=3, target_modules=targets, bias=bias, modules_to_save=whole or None)
    theirs = peft.get_peft_model(this.copy(), config)
    names = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", "")
        .removesuffix(".weight")
        for name in trainable_names(theirs)
    }
    assert {name.removesuffix(".weight") for name in trainable_names(adapter.model)} == names

    counted = adapter.summary()
    trainable, total = theirs.get_nb_trainable_parameters()
    # PEFT counts a whole module twice: the frozen original is still there beside the copy.
    originals = sum(p.numel() for p in this.base.classifier.parameters()) if whole else 0
    assert counted.trainable == trainable
    assert counted.total == total - originals


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_adapter_biases_round_trip_through_peft(name, bias, tmp_path):
    this = case(name)
    adapter = adapter_on(this.copy(), bias=bias)
    randomise(adapter.named_tensors())
    expected = this.logits(adapter.model)
    save_adapter(adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path / "ours")
    torch.testing.assert_close(this.logits(theirs), expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(this.copy(), tmp_path / "theirs")
    torch.testing.assert_close(this.logits(loaded.model), expected, rtol=0, atol=1e-5)


def test_adapter_bias_of_a_16_bit_base_raises():
    model = case("bert").copy().bfloat16()
    with pytest.raises(UserError, match=r"Set model\.dtype=float32"):
        adapter_on(model, bias="all")
    assert trainable_names(model) == {name for name, _ in model.named_parameters()}


class Stubborn(nn.Linear):
    """A linear layer whose weight is of a kind that cannot be merged into."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


def test_adapter_merge_error_merges_no_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Stubborn(4, 4), nn.Linear(4, 4))
    adapter = adapter_on(model)
    randomise(adapter.named_tensors())
    weights = [layer.base_layer.weight for layer in adapter.layers.values()]
    x = torch.randn(3, 4)
    before = model(x)
    for merge in (adapter.merge, adapter.merge_and_unload):
        with pytest.raises(UserError, match=r"^2: cannot merge into Stubborn"):
            merge()
        assert list(adapter.layers) == ["0", "1", "2", "3"]
        assert not any(layer.merged for layer in adapter.layers.values())
        for layer, weight in zip(adapter.layers.values(), weights, strict=True):
            assert layer.base_layer.weight is weight
        assert torch.equal(model(x), before)


def test_summary_counts_equal_counts_by_hand():
    model = case("llama-classifier").copy()
    adapter = adapter_on(
        model,
        modules_to_save=["score"],
        rank_pattern={"q_proj": 5},
        alpha_pattern={"down_proj": 12},
    )
    summary = adapter.summary()
    # Of one block: width 32, inner width 48, keys and values of width 16, rank 3, 5 on q_proj.
    widths = {
        "q_proj": (32, 32, 5, 6.0),
        "k_proj": (32, 16, 3, 6.0),
        "v_proj": (32, 16, 3, 6.0),
        "o_proj": (32, 32, 3, 6.0),
        "gate_proj": (32, 48, 3, 6.0),
        "up_proj": (32, 48, 3, 6.0),
        "down_proj": (48, 32, 3, 12.0),
    }
    assert len(summary.rows) == 14
    for row in summary.rows:
        fan_in, fan_out, rank, alpha = widths[row.name.rpartition(".")[2]]
        assert (row.in_features, row.out_features) == (fan_in, fan_out)
        assert (row.rank, row.alpha, row.scaling) == (rank, alpha, alpha / rank)
        assert row.parameters == rank * (fan_in + fan_out)
        assert row.kind == "Linear"
    low_rank = 2 * sum(rank * (i + o) for i, o, rank, _ in widths.values())
    assert summary.whole_modules == {"score": 64}
    assert summary.trainable == low_rank + 64
    base = sum(p.numel() for p in case("llama-classifier").base.parameters())
    assert summary.total == base + low_rank
    text = str(summary)
    share = f"{100 * summary.trainable / summary.total:.2f}"
    assert f"trainable {summary.trainable:,} of {summary.total:,} parameters ({share} %)" in text
    assert "mlp.down_proj" in text
    assert "score" in text
    assert len(text.splitlines()) == 1 + len(widths) + 2


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert", ["classifier"]),
        ("roberta", ["classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("qwen3-classifier", ["score"]),
    ],
)
def test_adapter_saved_modules_of_a_bf16_model_are_fp32(name, heads, tmp_path):
    this = case(name)
    model = this.copy().bfloat16()
    base = model(**this.inputs).logits.detach()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = adapter_on(model, modules_to_save=heads)
    assert {value.dtype for value in adapter.named_tensors().values()} == {torch.float32}
    with adapter.disabled():
        disabled = this.logits(model)
    # The head is computed in fp32 and rounded once: within bf16's own error of the bf16 head.
    torch.testing.assert_close(disabled, base, rtol=0.05, atol=0.05)

    randomise(adapter.named_tensors())
    logits = model(**this.inputs).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    for key, value in adapter.named_tensors().items():
        assert value.grad is not None, key
        assert value.grad.any(), key
    expected = this.logits(model)

    save_adapter(adapter, tmp_path)
    again = load_adapter(this.copy().bfloat16(), tmp_path)
    assert torch.equal(this.logits(again.model), expected)

    again.remove()
    after = again.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(this.logits(again.model), base)

    merged = adapter.merge_and_unload()
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(this.logits(merged), expected, rtol=0.1, atol=0.15)


def test_adapter_saved_head_tied_to_embeddings_is_untied(tmp_path):
    this = case("gpt2")
    model = this.copy()
    tied = model.transformer.wte.weight
    adapter = adapter_on(model, modules_to_save=["lm_head"])
    assert model.lm_head.weight is not tied
    assert not tied.requires_grad
    randomise(adapter.named_tensors())
    adapted = this.logits(model)
    assert torch.equal(tied, this.base.transformer.wte.weight)

    save_adapter(adapter, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path / "ours")
    torch.testing.assert_close(this.logits(theirs), adapted, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(this.copy(), tmp_path / "theirs")
    torch.testing.assert_close(this.logits(loaded.model), adapted, rtol=0, atol=1e-5)

    with adapter.disabled():
        assert torch.equal(this.logits(model), this.logits(this.base))
    loaded.remove()
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert torch.equal(this.logits(loaded.model), this.logits(this.base))

    merged = adapter.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path / "merged")
    stored = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(this.logits(stored), adapted, rtol=0, atol=5e-5)


def test_adapter_quantized_saved_module_raises_without_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"lora\.modules_to_save: 1\.weight is quantized"):
        adapter_on(model, targets=["0"], modules_to_save=["1"])
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_adapter_on_an_adapted_model_raises():
    this = case("bert")
    model = this.copy()
    adapter = adapter_on(model)
    randomise(adapter.named_tensors())
    adapted = this.logits(model)
    with pytest.raises(UserError, match="already has a LoRA adapter"):
        adapter_on(model)
    assert torch.equal(this.logits(model), adapted)
    adapter.remove()
    assert adapter_on(model).layers


def test_adapter_remove_restores_requires_grad():
    model = case("bert").copy()
    model.bert.embeddings.requires_grad_(False)
    before = trainable_names(model)
    adapter_on(model, modules_to_save=["classifier"]).remove()
    assert trainable_names(model) == before


def test_adapter_keeps_the_training_mode():
    model = case("bert").copy()
    for mode in (True, False):
        model.train(mode)
        adapter = adapter_on(model, dropout=0.1)
        assert {module.training for module in model.modules()} == {mode}
        adapter.remove()


def test_load_tensors_mismatch_raises_without_changes():
    adapter = adapter_on(case("bert").copy(), modules_to_save=["classifier"])
    randomise(adapter.named_tensors())
    good = {name: value.detach().clone() for name, value in adapter.named_tensors().items()}
    first = next(iter(good))
    bad = [
        ({k: v for k, v in good.items() if k != first}, f"lacks 1 tensors .{first}"),
        ({**good, "extra.lora_A.weight": torch.zeros(1)}, "has 1 unexpected tensors .extra"),
        ({**good, first: torch.zeros(2, 2)}, rf"{first} is \(2, 2\) instead of \(3, 32\)"),
        ({**good, first: torch.full_like(good[first], torch.nan)}, f"not finite in {first}"),
    ]
    for tensors, message in bad:
        with pytest.raises(UserError, match=message):
            adapter.load_tensors({name: value * 2 for name, value in tensors.items()})
        now = adapter.named_tensors()
        assert all(torch.equal(now[name], value) for name, value in good.items())
