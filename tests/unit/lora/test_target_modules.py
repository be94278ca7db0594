"""Which modules an adapter goes on: PEFT's selection, and an error for whatever matches nothing."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from torch import nn

from helpers.architectures import case
from helpers.models import randomise
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    save_adapter,
)
from lora_lightning.lora.module_index import ModuleIndex, head_modules
from lora_lightning.lora.name_patterns import shortest_suffix
from lora_lightning.lora.target_modules import match_targets

LLAMA_BLOCK = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def ours(model, **settings) -> dict[str, tuple[int, float]]:
    """Name -> rank and scaling of every module that our rules choose."""
    settings = {"rank": 4, "alpha": 8, **settings}
    matches = match_targets(model, LoraConfig(**settings))
    return {match.name: (match.rank, match.scaling) for match in matches}


def theirs(model, **settings) -> dict[str, tuple[int, float]]:
    """The same from modules that PEFT has really wrapped."""
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, **settings), model, adapter_name="default"
    )
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, PeftLoraLayer)
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert", "falcon"])
@pytest.mark.parametrize(
    ("our_settings", "their_settings"),
    [
        ({"targets": "SUFFIXES"}, {"target_modules": "SUFFIXES"}),
        ({"targets": r".*\.1\..*(q|c_attn|query|v|c_proj|v_proj|dense)"}, None),
        ({"targets": "SUFFIXES", "layers": [1]}, {"layers_to_transform": [1]}),
        (
            {"targets": "SUFFIXES", "layers": [0], "layers_pattern": "LISTS"},
            {"layers_to_transform": [0], "layers_pattern": "LISTS"},
        ),
        ({"targets": "SUFFIXES", "exclude": "FIRST"}, {"exclude_modules": "FIRST"}),
        (
            {"targets": "SUFFIXES", "exclude": r".*\.0\..*"},
            {"exclude_modules": r".*\.0\..*"},
        ),
        (
            {"targets": "SUFFIXES", "rank_pattern": {"LAST": 2}, "alpha_pattern": {"LAST": 6}},
            {"rank_pattern": {"LAST": 2}, "alpha_pattern": {"LAST": 6}},
        ),
        (
            {"targets": "SUFFIXES", "rank_pattern": {r".*\.0\..*": 16}, "use_rslora": True},
            {"rank_pattern": {r".*\.0\..*": 16}, "use_rslora": True},
        ),
    ],
    ids=["suffix", "regex", "layers", "pattern", "exclude", "exclude-regex", "rank", "rslora"],
)
def test_match_targets_equals_peft(name, our_settings, their_settings):
    suffixes, lists = {
        "llama": (["q_proj", "v_proj", "mlp.down_proj"], ["layers"]),
        "falcon": (["query_key_value", "dense_4h_to_h"], ["h"]),
        "gpt2": (["c_attn", "mlp.c_proj"], ["h"]),
        "t5": (["SelfAttention.q", "v", "wo"], ["block"]),
        "bart": (["q_proj", "v_proj", "fc1"], ["layers"]),
        "bert": (["query", "value", "output.dense"], ["layer"]),
    }[name]

    def fill(value):
        if isinstance(value, dict):
            return {fill(key): fill(item) for key, item in value.items()}
        known = {"SUFFIXES": suffixes, "LISTS": lists, "FIRST": suffixes[:1], "LAST": suffixes[-1]}
        return known[value] if isinstance(value, str) and value in known else value

    our_settings = fill(our_settings)
    if their_settings is None:
        their_settings = {"target_modules": our_settings["targets"]}
    their_settings = {"target_modules": suffixes, **fill(their_settings)}
    model = case(name).copy()
    chosen = ours(model, **our_settings)
    assert chosen
    assert chosen == theirs(model, **their_settings)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "opt", "falcon", "bloom", "phi"])
def test_all_linear_equals_peft_for_language_models(name):
    model = case(name).copy()
    assert ours(model) == theirs(model, target_modules="all-linear")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", ["lm_head"]),
        ("llama-classifier", ["score"]),
        ("gpt2-classifier", ["score"]),
        ("t5", ["lm_head"]),
        ("bert", ["classifier"]),
        ("bert-masked", ["cls", "cls.predictions.decoder"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("bart-classifier", ["classification_head"]),
        ("modernbert", ["head", "classifier"]),
    ],
)
def test_all_linear_skips_heads(name, heads):
    model = case(name).copy()
    assert head_modules(model) == heads
    chosen = ours(model)
    linears = {
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    in_heads = {key for key in linears if any(f"{key}.".startswith(f"{h}.") for h in heads)}
    assert in_heads
    assert set(chosen) == linears - in_heads


def test_match_targets_keeps_the_models_order():
    names = list(ours(case("llama").copy()))
    assert names == [f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in LLAMA_BLOCK]
    one = ours(case("llama").copy(), targets="q_proj, v_proj", layers=[1])
    assert list(one) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize(
    ("settings", "option", "wrong", "near", "listed"),
    [
        ({"targets": ["q_proj", "v_prj"]}, "lora.targets", "'v_prj'", "'v_proj'", "o_proj (x2)"),
        ({"targets": r".*\.q_prj"}, "lora.targets", "q_prj", "q_proj'", "o_proj (x2)"),
        ({"targets": ["input_layernorm"]}, "lora.targets", "'input_layernorm'", "LlamaRMSNorm", ""),
        ({"exclude": ["upproj"]}, "lora.exclude", "'upproj'", "'up_proj'", "gate_proj (x2)"),
        ({"exclude": r".*\.upproj"}, "lora.exclude", "upproj", "up_proj'", "gate_proj (x2)"),
        ({"layers": [0, 7]}, "lora.layers", "layer 7", "0 to 1", ""),
        (
            {"layers": [0], "layers_pattern": ["layers", "layrs"]},
            "lora.layers_pattern",
            "'layrs'",
            "'layers'",
            "Lists that can be matched: layers.",
        ),
        (
            {"rank_pattern": {"q_proj": 2, "kproj": 2}},
            "lora.rank_pattern",
            "'kproj'",
            "'k_proj'",
            "o_proj (x2)",
        ),
        (
            {"alpha_pattern": {"lm_heat": 2}, "targets": ["lm_head", "q_proj"]},
            "lora.alpha_pattern",
            "'lm_heat'",
            "'lm_head'",
            "q_proj (x2)",
        ),
        (
            {"modules_to_save": ["lm_haed"]},
            "lora.modules_to_save",
            "'lm_haed'",
            "'lm_head'",
            "embed_tokens (x1)",
        ),
        (
            {"targets": ["q_proj"], "exclude": ["self_attn.q_proj"]},
            "lora.targets",
            "=['q_proj'] without lora.exclude=['self_attn.q_proj']",
            "leaves no module",
            "o_proj (x2)",
        ),
        (
            {"targets": ["lm_head"], "modules_to_save": ["lm_head"]},
            "lora.targets",
            "'lm_head'",
            "trained whole",
            "o_proj (x2)",
        ),
    ],
)
def test_pattern_without_a_match_raises(settings, option, wrong, near, listed):
    model = case("llama").copy()
    with pytest.raises(UserError) as caught:
        Adapter(model, LoraConfig(**settings))
    message = str(caught.value)
    assert message.startswith(option)
    for part in (wrong, near, listed):
        assert part in message
    assert all(parameter.requires_grad for parameter in model.parameters())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def test_target_that_lora_cannot_wrap_raises():
    with pytest.raises(UserError, match="no linear .* LoRA does not support BatchNorm2d, Conv2d"):
        match_targets(Images(), LoraConfig(targets=["conv"]))
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"a Conv2d, .* by last name: 1 \(x1\)"):
        match_targets(mixed, LoraConfig(targets=["0"]))


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_pattern_without_effect_raises(option):
    """The first that matches counts, in PEFT too."""
    model = case("llama").copy()
    wide, narrow = "q_proj", "layers.1.self_attn.q_proj"
    with pytest.raises(
        UserError, match=rf"lora.{option}: '{narrow}' has no effect, since '{wide}'"
    ):
        match_targets(model, LoraConfig(**{option: {wide: 3, narrow: 5}}))
    assert match_targets(model, LoraConfig(**{option: {narrow: 5, wide: 3}}))


def test_parts_pattern_without_effect_raises():
    model = case("gpt2").copy()
    parts = {"c_attn": ["q", "-k", "v"], "h.1.attn.c_attn": ["q", "k", "v"]}
    with pytest.raises(UserError, match=r"lora.parts: 'h.1.attn.c_attn' has no effect"):
        match_targets(model, LoraConfig(targets=["c_attn"], parts=parts))


class WithTorchLayers(nn.Module):
    """PyTorch's own attention and encoder layer, which read weights without calling the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.block(self.attention(x, x, x, need_weights=False)[0]))


def test_uncalled_layers_are_not_adaptable():
    model = WithTorchLayers()
    assert list(ModuleIndex(model).adaptable) == ["block.linear1", "block.linear2", "out"]
    with pytest.raises(UserError, match="'out_proj' is .* reads its weight without calling it"):
        match_targets(model, LoraConfig(targets=["out_proj", "out"]))
    parameters = ["attention.in_proj_weight", "attention.out_proj.weight"]
    with pytest.raises(UserError, match="attention.out_proj.weight: .* without calling it"):
        match_targets(model, LoraConfig(target_parameters=parameters))
    with pytest.raises(UserError, match=r"no linear .* without calling it. .*in_proj_weight"):
        match_targets(nn.MultiheadAttention(8, 2), LoraConfig())


class NeverCalled(nn.Linear):
    def forward(self, x):
        raise AssertionError("called after all")


def test_pytorch_reads_weights_without_calling_the_layers():
    """The reason for the rules here: if this fails, they can go."""
    model = WithTorchLayers().eval()
    model.attention.out_proj = NeverCalled(8, 8)
    model.block.linear1, model.block.linear2 = NeverCalled(8, 16), NeverCalled(16, 8)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 8)).shape == (2, 3, 4)


class Encoder(nn.Module):
    """Torch's encoder, which in evaluation packs padded rows and hands all weights to a kernel."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(block, 2)

    def forward(self, x):
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 2:] = True
        return self.encoder(x, src_key_padding_mask=padding)[:, :2]


WEIGHTS = ("linear1.weight", "linear2.weight", "self_attn.in_proj_weight")


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["linear1", "linear2"]},
        {"targets": "all-linear"},
        {"targets": None, "target_parameters": list(WEIGHTS)},
        {"targets": ["linear2"], "target_parameters": ["self_attn.in_proj_weight"]},
        {"targets": ["linear1"], "use_dora": True},
    ],
)
def test_adapter_in_torch_encoder_equals_summed_weights(settings):
    """By the same encoder with W + s B A as plain weights, in which nothing is adapted."""
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(3, 4, 8)
    truth = deepcopy(model).eval()
    adapter = Adapter(model, LoraConfig(rank=2, **settings))
    randomise({n: t for n, t in adapter.named_tensors().items() if t.requires_grad})
    for name, layer in adapter.layers.items():
        key = name if name.endswith("weight") else f"{name}.weight"
        with torch.no_grad():
            truth.get_parameter(key).add_(layer.delta_weight())
    with torch.no_grad():
        expected = truth(x)
        for mode in (True, False):
            torch.testing.assert_close(model.train(mode)(x), expected, rtol=0, atol=1e-5)
        adapter.merge()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        with adapter.disabled():
            assert (model(x) - expected).abs().max() > 1e-2
    assert model.encoder.use_nested_tensor is False
    bare = adapter.remove()
    assert bare.encoder.use_nested_tensor is True
    assert not any(module._forward_pre_hooks for module in bare.modules())


class Shared(nn.Module):
    """One embedding under two names, and one linear under two names, all of them called."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Module(), nn.Module()
        self.source.embed = self.target.embed = nn.Embedding(9, 6)
        self.source.dense = self.target.proj = nn.Linear(6, 6)

    def forward(self, ids):
        source = self.source.dense(self.source.embed(ids))
        return self.target.proj(source + self.target.embed(ids))


@pytest.mark.parametrize("target", ["embed", "target.embed", r"target\.e.*"])
def test_shared_module_is_replaced_under_all_names(target):
    torch.manual_seed(0)
    model = Shared()
    ids = torch.arange(9)
    before = model(ids)
    embed, dense = model.source.embed, model.source.dense
    targets = target if "*" in target else [target, "proj"]
    adapter = Adapter(model, LoraConfig(rank=2, targets=targets))
    assert model.source.embed is model.target.embed is adapter.layers["source.embed"]
    if targets != target:
        assert model.source.dense is model.target.proj is adapter.layers["source.dense"]
    assert torch.equal(model(ids), before)

    randomise(adapter.named_tensors())
    unmerged = model(ids)
    assert not torch.allclose(unmerged, before)
    adapter.merge()
    torch.testing.assert_close(model(ids), unmerged, rtol=0, atol=1e-5)
    adapter.remove()
    assert model.source.embed is model.target.embed is embed
    assert model.source.dense is model.target.proj is dense
    assert torch.equal(model(ids), before)


def test_t5_embeddings_are_both_adapted():
    """They share a weight, not a module: each gets an adapter of its own, and uses it."""
    this = case("t5")
    adapter = Adapter(this.copy(), LoraConfig(rank=2, targets=["embed_tokens"]))
    assert list(adapter.layers) == ["encoder.embed_tokens", "decoder.embed_tokens"]
    randomise(adapter.named_tensors())
    adapter.model(**this.inputs).logits.sum().backward()
    assert all(tensor.grad.any() for tensor in adapter.named_tensors().values())


@pytest.mark.parametrize(
    ("name", "others", "suffix"),
    [
        ("a.b.q", ["a.b.k"], "q"),
        ("a.b.q", ["a.c.q"], "b.q"),
        ("q", ["a.q"], "q"),
        ("a.q", ["aq", "b.xq"], "q"),
        ("a.b.q", ["c.a.b.q"], "a.b.q"),
    ],
)
def test_shortest_suffix_matches_no_other_name(name, others, suffix):
    assert shortest_suffix(name, others) == suffix


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.subhead = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.head(self.trunk(x)), self.subhead(x)


def test_saved_module_that_peft_confuses_raises(tmp_path):
    """PEFT compares ends of names: "head" is "subhead" too, and its file would have one alone."""
    with pytest.raises(UserError, match=r"head cannot .* without subhead.*=\[head,subhead\]"):
        Adapter(TwoHeads(), LoraConfig(targets=["trunk"], modules_to_save=["head"]))
    for saved in (["subhead"], ["head", "subhead"]):
        model = TwoHeads()
        adapter = Adapter(model, LoraConfig(targets=["trunk"], modules_to_save=saved))
        with torch.no_grad():
            for tensor in adapter.named_tensors().values():
                tensor.normal_()
        save_adapter(adapter, tmp_path / saved[-1] / str(len(saved)))
        theirs = peft.PeftModel.from_pretrained(TwoHeads(), tmp_path / saved[-1] / str(len(saved)))
        found = theirs.base_model.model
        for name in saved:
            ours = dict(model.named_modules())[name].weight
            assert torch.equal(getattr(found, name).modules_to_save["default"].weight, ours)
