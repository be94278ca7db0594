"""Every trained tensor acts: what no gradient reaches is left out, or refused, the same by all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lightning.lora import Adapter, LoraConfig, UserError
from lora_lightning.lora.target_modules import match_targets


class Windows(nn.Module):
    """Attention that hands its weights to a function, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.mlp = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.mlp(F.linear(mixed, self.proj.weight, self.proj.bias))


def test_check_gradients_of_uncalled_layers_raises():
    model = nn.Sequential(Windows(), Windows())
    adapter = Adapter(model, LoraConfig(rank=2))
    model(torch.randn(2, 5, 6)).sum().backward()
    with pytest.raises(
        UserError, match=r"8 of 12 .* such as 0\.qkv.*, get no gradient.*exclude=\[qkv,proj\]"
    ):
        adapter.check_gradients()
    adapter.remove()
    adapter = Adapter(model, LoraConfig(rank=2, exclude=["qkv", "proj"]))
    model(torch.randn(2, 5, 6)).sum().backward()
    assert adapter.check_gradients() == []


class Experts(nn.Module):
    """Two experts, of which each row is sent to one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, to):
        return x + self.experts[to](x)


def test_check_gradients_returns_an_expert_without_rows():
    model = Experts()
    adapter = Adapter(model, LoraConfig(rank=2))
    model(torch.randn(3, 4), 1).sum().backward()
    assert adapter.check_gradients() == [f"experts.0.lora_{m}.weight" for m in "AB"]


def test_all_linear_adapts_both_towers_of_clip():
    """CLIP is no language model that takes images too: it has no head on its text."""
    import transformers as tf

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 30, "intermediate_size": 16}
    vision = {**sizes, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision))
    names = [match.name for match in match_targets(model, LoraConfig())]
    assert {name.partition(".")[0] for name in names} >= {"text_model", "vision_model"}
