"""Layers of other classes: what they do with their weight is found, or no weight is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.models import randomise
from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.layers.embedding import LoraEmbedding
from lora_lightning.lora.layers.linear import LoraLinear


class Other(nn.Module):
    """A linear layer of a class of its own."""

    def __init__(self, fan_in: int, fan_out: int, *, turned: bool, factor: float = 1.0) -> None:
        super().__init__()
        self.in_features, self.out_features = fan_in, fan_out
        self.turned, self.factor = turned, factor
        shape = (fan_in, fan_out) if turned else (fan_out, fan_in)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(fan_out))

    def forward(self, x):
        matrix = self.weight if self.turned else self.weight.t()
        return x @ matrix * self.factor + self.bias


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
CONFIGS = [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "olora"}]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("fan_out", [4, 7])
@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_merge_follows_the_weights_layout(turned, fan_out, settings):
    """By the definition in float64, from the weight as (out, in)."""
    torch.manual_seed(0)
    base = Other(4, fan_out, turned=turned)
    model = nn.Sequential(base)
    weight = (base.weight.t() if turned else base.weight).detach().double()
    before = model(X).detach()
    adapter = Adapter(model, LoraConfig(rank=2, alpha=3, **settings))
    torch.testing.assert_close(model(X), before, rtol=0, atol=1e-5)
    randomise({n: t for n, t in adapter.named_tensors().items() if t.requires_grad})
    (layer,) = adapter.layers.values()
    a, b = (matrix.double() for matrix in layer.matrices())
    whole = weight + 1.5 * b @ a
    if settings.get("use_dora"):
        norm = torch.linalg.vector_norm(whole, dim=1)
        whole *= (layer.lora_magnitude_vector.double() / norm)[:, None]
    expected = (X.double() @ whole.t() + base.bias.double()).float()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)
    adapter.unmerge()
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layout_of_works_in_every_dtype(dtype):
    for turned in (False, True):
        layer = LoraLinear(Other(64, 64, turned=turned).to(dtype), 2, scaling=1.0)
        assert layer.layout == ("(in, out)" if turned else "(out, in)")


def refuses_to_merge(model: nn.Module, said: str) -> Adapter:
    """An adapter on a model that refuses to merge, and changes no output by that."""
    adapter = Adapter(model, LoraConfig(rank=2))
    randomise(adapter.named_tensors())
    before = model(X)
    with pytest.raises(UserError, match=said):
        adapter.merge()
    assert torch.equal(model(X), before)
    return adapter


def test_merge_of_a_layer_that_scales_raises():
    model = nn.Sequential(Other(4, 4, turned=False, factor=2.0))
    for settings in CONFIGS[1:]:
        with pytest.raises(UserError, match="a Other does not compute weight times input"):
            Adapter(model, LoraConfig(rank=2, **settings))
    refuses_to_merge(model, "0: a Other does not compute weight times input")


def test_merge_of_a_layer_with_a_hook_raises():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda _, __, output: 2 * output)
    adapter = refuses_to_merge(model, "cannot merge into Linear.*Use the adapter unmerged")
    assert not any(layer.merged for layer in adapter.layers.values())


class Positions(nn.Embedding):
    """Rows from the second on, as OPT and BART count positions."""

    def forward(self, ids):
        return super().forward(ids + 2)


def test_embedding_with_other_rows_raises():
    with pytest.raises(
        UserError, match="Positions does not return the requested rows .*lora.exclude"
    ):
        LoraEmbedding(Positions(9, 4), 2, scaling=1.0)


def test_merge_of_an_embedding_that_scales_raises():
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5))
    adapter = Adapter(model, LoraConfig(rank=2, targets=["0"]))
    randomise(adapter.named_tensors())
    with pytest.raises(UserError, match="cannot merge into Embedding"):
        adapter.merge()


def test_probe_leaves_the_generator_unchanged():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    base = Other(4, 4, turned=True)
    torch.set_rng_state(state)
    from lora_lightning.lora.probe import layout_of

    layout_of(base)
    assert torch.equal(torch.get_rng_state(), state)
