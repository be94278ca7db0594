"""Parts of fused layers, against the same model whose parts are layers of their own."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.architectures import case
from helpers.asserts import assert_tensors_close
from helpers.models import randomise
from lora_lightning.adapters.combine import combine_adapters
from lora_lightning.adapters.export import write_canonical
from lora_lightning.config.schema import OptimConfig
from lora_lightning.lora import (
    Adapter,
    AdapterSet,
    LoraConfig,
    UserError,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lora_lightning.lora.layers.fused_qkv import SplitConv1D, SplitLinear
from lora_lightning.training.optim import build_optimizer

SIZES = {"q": 32, "k": 16, "v": 16}
# Settings of lora.parts, and how large the parts are.
FUSED = {
    "gpt2": ({"c_attn": ["q", "-k", "v"]}, {"c_attn": {"q": 32, "k": 32, "v": 32}}),
    "phi3": (
        {"qkv_proj": {"-q": 32, "k": 16, "v": 16}, "gate_up_proj": ["gate", "up"]},
        {"qkv_proj": SIZES, "gate_up_proj": {"gate": 48, "up": 48}},
    ),
}
ADAPTED = {"c_attn": "qv", "qkv_proj": "kv", "gate_up_proj": ("gate", "up")}


class Separate(nn.Module):
    """Linear layers side by side, in the place of a fused one."""

    def __init__(self, fused: nn.Module, sizes: dict[str, int]) -> None:
        super().__init__()
        weight, bias = fused.weight.detach(), getattr(fused, "bias", None)
        rows = weight if isinstance(fused, nn.Linear) else weight.t()
        start = 0
        for name, size in sizes.items():
            linear = nn.Linear(rows.shape[1], size, bias=bias is not None)
            with torch.no_grad():
                linear.weight.copy_(rows[start : start + size])
                if bias is not None:
                    linear.bias.copy_(bias[start : start + size])
            setattr(self, name, linear)
            start += size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def settings_of(name: str, **more) -> dict:
    patterns = {} if name == "gpt2" else {"rank_pattern": {"gate_up_proj": 3}}
    targets = list(FUSED[name][0])
    return {"rank": 2, "alpha": 3, "targets": targets, **patterns, **more}


def fused(name: str, **more) -> Adapter:
    return Adapter(case(name).copy(), LoraConfig(parts=FUSED[name][0], **settings_of(name, **more)))


def separate(name: str, **more) -> Adapter:
    """The oracle: three layers for one, each with plain LoRA."""
    model = case(name).copy()
    targets = []
    for path, module in list(model.named_modules()):
        sizes = FUSED[name][1].get(path.rpartition(".")[2])
        if sizes is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Separate(module, sizes))
            targets += [f"{path}.{part}" for part in ADAPTED[leaf]]
    ranks = {} if name == "gpt2" else {"rank_pattern": {"gate": 3, "up": 3}}
    return Adapter(model, LoraConfig(**settings_of(name, **more, **ranks) | {"targets": targets}))


def by_part(adapter: Adapter, *, gradient: bool = False) -> dict[str, Tensor]:
    """A and B (or their gradients) of each part, by the names of the oracle."""
    found = {}
    for name, layer in adapter.layers.items():
        if not isinstance(layer, (SplitLinear, SplitConv1D)):
            pairs = {name: (layer.lora_A, layer.lora_B)}
            if gradient:
                pairs = {name: (layer.lora_A.grad, layer.lora_B.grad)}
        else:
            a, b = layer.lora_A, layer.lora_B
            if gradient:
                a, b = a.grad, b.grad
            parts = [part for part in layer.parts if part.adapted]
            pairs = {
                f"{name}.{part.name}": pair
                for part, *pair in zip(
                    parts,
                    a.split(layer.rank),
                    b.split([part.size for part in parts]),
                    strict=True,
                )
            }
        for part, (own_a, own_b) in pairs.items():
            found[f"{part}.A"], found[f"{part}.B"] = own_a, own_b
    return found


def copy_values(source: Adapter, target: Adapter) -> None:
    values = by_part(source)
    with torch.no_grad():
        for name, tensor in by_part(target).items():
            tensor.copy_(values[name])


def train(adapter: Adapter, inputs: dict[str, Tensor], steps: int) -> None:
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(adapter.model.named_parameters(), config)
    for _ in range(steps):
        optimizer.zero_grad()
        adapter.model(**inputs).logits.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_split_layer_equals_separate_layers(name, rslora, tmp_path):
    """Logits, gradients, parameters, AdamW with decay; then the file in PEFT and here."""
    this = case(name)
    model = this.copy().double()
    ours, oracle = fused(name, use_rslora=rslora), separate(name, use_rslora=rslora)
    assert torch.equal(this.logits(ours.model), this.logits(this.base))
    ours.model.double()
    oracle.model.double()
    copy_values(oracle, ours)
    assert ours.summary().trainable == oracle.summary().trainable
    for adapter in (ours, oracle):
        train(adapter, this.inputs, 6)
    logits = this.logits(oracle.model)
    assert (logits - this.logits(model)).abs().max() > 1e-2
    torch.testing.assert_close(this.logits(ours.model), logits, rtol=0, atol=1e-9)
    for adapter in (ours, oracle):
        adapter.model.zero_grad()
        adapter.model(**this.inputs).logits.square().mean().backward()
    assert_tensors_close(by_part(ours, gradient=True), by_part(oracle, gradient=True), rtol=1e-5)
    assert_tensors_close(by_part(ours), by_part(oracle), rtol=1e-5)

    ours.model.float()
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path)
    torch.testing.assert_close(this.logits(theirs), logits.float(), rtol=0, atol=1e-5)
    whole = load_adapter(this.copy(), tmp_path)
    torch.testing.assert_close(this.logits(whole.model), logits.float(), rtol=0, atol=1e-5)
    ours.merge()
    torch.testing.assert_close(this.logits(ours.model), logits.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_split_layer_file_has_blocks_and_zeros(name, tmp_path):
    adapter = fused(name)
    randomise(adapter.named_tensors())
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    for path, layer in adapter.layers.items():
        leaf = path.rpartition(".")[2]
        b = tensors[f"base_model.model.{path}.lora_B.weight"]
        count, row, column = len(ADAPTED[leaf]), 0, 0
        rank = 3 if leaf == "gate_up_proj" else 2
        assert b.shape == (sum(FUSED[name][1][leaf].values()), count * rank)
        for part, size in FUSED[name][1][leaf].items():
            block = b[row : row + size]
            if part in ADAPTED[leaf]:
                own = block[:, column : column + rank]
                assert own.count_nonzero() == own.numel()
                assert block.count_nonzero() == own.numel()
                column += rank
            else:
                assert not block.any()
            row += size
        assert raw["rank_pattern"].get(leaf, raw["r"]) == count * rank
        assert raw["alpha_pattern"].get(leaf, raw["lora_alpha"]) == count * 3
        trained = sum(t.numel() for t in layer.parameters() if t.requires_grad)
        assert trained == layer.lora_A.numel() + sum(
            FUSED[name][1][leaf][part] * rank for part in ADAPTED[leaf]
        )
    # Training goes on from it, in parts again.
    again = fused(name)
    again.load_tensors(read_adapter(tmp_path)[1])
    assert_tensors_close(again.named_tensors(), adapter.named_tensors(), rtol=1e-5)


def test_split_layer_with_a_dense_file_raises(tmp_path):
    this = case("gpt2")
    plain = Adapter(this.copy(), LoraConfig(rank=4, targets=["c_attn"]))
    randomise(plain.named_tensors())
    save_adapter(plain, tmp_path)
    adapter = fused("gpt2")
    before = {name: tensor.clone() for name, tensor in adapter.named_tensors().items()}
    with pytest.raises(UserError, match="must be zero outside of these parts"):
        adapter.load_tensors(read_adapter(tmp_path)[1])
    tensors = read_adapter(tmp_path)[1]
    with pytest.raises(UserError, match=r"B is \(96, 3\), must be \(96, 4\) for these parts"):
        adapter.load_tensors({n: t[:, :3] if "lora_B" in n else t for n, t in tensors.items()})
    assert all(torch.equal(before[name], t) for name, t in adapter.named_tensors().items())


def test_split_adapters_combine_and_serve_by_row(tmp_path):
    this = case("gpt2")
    adapter = fused("gpt2")
    randomise(adapter.named_tensors())
    expected = this.logits(adapter.model)
    save_adapter(adapter, tmp_path / "a")
    combine_adapters([tmp_path / "a", tmp_path / "a"], tmp_path / "sum", weights=[0.25, 0.75])
    write_canonical(tmp_path / "a", tmp_path / "canonical")
    adapters = AdapterSet(this.copy())
    for folder in ("a", "sum", "canonical"):
        adapters.add(folder, tmp_path / folder)
    for folder in adapters.adapters:
        logits = this.logits(adapters[folder])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    logits = adapters(["a", None], **this.inputs).logits
    torch.testing.assert_close(logits[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1], this.logits(this.base)[1], rtol=0, atol=1e-5)


def test_summary_names_the_parts():
    told = str(fused("phi3").summary())
    assert "self_attn.qkv_proj [k v]" in told
    assert "mlp.gate_up_proj [gate up]" in told
    assert "32 -> 64" in told


REFUSED = {
    "sum": ("phi3", {"qkv_proj": {"q": 32, "k": 16, "v": 15}}, "32 .q. .* is 63, .* has 64"),
    "shares": ("phi3", {"qkv_proj": ["q", "k", "v"]}, "64 outputs are not 3 equal parts"),
    "no layer": ("gpt2", {"c_atn": ["q", "k", "v"]}, "Did you mean 'c_attn'"),
    "none": ("gpt2", {"c_attn": ["-q", "-k", "-v"]}, "must adapt a part"),
    "one": ("gpt2", {"c_attn": ["q"]}, "two parts or more"),
    "no list": ("gpt2", {"c_attn": 3}, "two parts or more"),
    "twice": ("gpt2", {"c_attn": ["q", "-q", "v"]}, "must name each part once"),
    "size": ("gpt2", {"c_attn": {"q": 0, "k": 96}}, "size 0 of 'q' must be a whole number"),
    "bloom": ("bloom", {"query_key_value": ["q", "k", "v"]}, "contiguous rows, but .* of bloom"),
    "latent": ("deepseek-v3", {"kv_b_proj": ["k", "v"]}, "kv_b_proj of deepseek_v3"),
    "gpt-neox": ("gpt-neox", {"query_key_value": ["q", "k", "v"]}, "contiguous rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_parts_that_are_invalid_raise(what):
    name, parts, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        Adapter(case(name).copy(), LoraConfig(parts=parts))


def test_parts_of_an_embedding_raise():
    with pytest.raises(UserError, match="Embedding has no parts"):
        Adapter(case("gpt2").copy(), LoraConfig(targets=["wte"], parts={"wte": ["a", "b"]}))


def test_parts_of_multi_query_falcon_are_contiguous():
    """Its queries come first, then the one key and the one value."""
    this = case("falcon")
    assert this.base.config.multi_query
    parts = {"query_key_value": {"q": 32, "-k": 8, "v": 8}}
    adapter = Adapter(this.copy(), LoraConfig(targets=["query_key_value"], parts=parts))
    assert adapter.summary().rows[0].parts == ("q", "v")
    grouped = this.copy()
    grouped.config.new_decoder_architecture = True
    with pytest.raises(UserError, match="contiguous rows"):
        Adapter(grouped, LoraConfig(targets=["query_key_value"], parts=parts))
