"""CPU kernels compute what torch and transformers compute."""

from __future__ import annotations

import os
from copy import deepcopy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import BertConfig, BertModel, FalconConfig, FalconModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_lightning.config.compose import compose_config, config_hash
from lora_lightning.config.schema import ModelConfig
from lora_lightning.models import cpu_kernels
from lora_lightning.models.cpu_kernels import (
    ATTENTION,
    FastDropout,
    attend,
    dropout,
    prepare_for_cpu,
)
from lora_lightning.models.loading import load_classifier
from lora_lightning.models.tokenizer import load_tokenizer
from lora_lightning.utils.cpu_load import load_warning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 403, dtype=dtype, requires_grad=True)
    out = dropout(x, p)
    kept = out != 0
    share = round(p * 2**16) / 2**16
    sigma = (share * (1 - share) / x.numel()) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - share, abs=4 * sigma)
    # Four elements come of one draw of 64 bits: each of the four is dropped as often, and the
    # share of neighbours that are both dropped is that of independent ones.
    dropped = ~kept.flatten()
    for lane in range(4):
        found = dropped[lane::4].float().mean().item()
        assert found == pytest.approx(share, abs=4 * 2 * sigma)
    both = (dropped[1:] & dropped[:-1]).float().mean().item()
    assert both == pytest.approx(share**2, abs=5 * (share**2 / x.numel()) ** 0.5)
    scale = torch.tensor(1 / (1 - share), dtype=dtype)
    torch.testing.assert_close(out[kept].unique(), scale.view(1))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())  # x is one: both are the mask


def test_dropout_follows_the_seed_and_torchs_off_switches():
    x = torch.randn(64, 65)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(x, 0.3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert dropout(x, 0.3, training=False) is x
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))
    assert dropout(torch.empty(0, 3), 0.3).shape == (0, 3)


def masks(rows: int, positions: int) -> list[torch.Tensor | None]:
    seen = torch.ones(rows, 1, positions, positions, dtype=torch.bool)
    seen[0, :, :, -2:] = False
    return [None, seen, torch.zeros(seen.shape).masked_fill(~seen, -1e9)]


@pytest.mark.parametrize("which", range(3), ids=["no mask", "boolean", "added"])
def test_attention_with_dropout_has_the_plain_attention_as_mean(which):
    """What nothing is dropped of equals transformers'; what is dropped of has that as its mean."""
    module = nn.Module().train()
    module.is_causal = False
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = masks(2, 7)[which]
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    truth, _ = sdpa_attention_forward(module, *inputs, mask, dropout=0.0, scaling=0.3)
    found, _ = attend(module, *inputs, mask, dropout=1e-12, scaling=0.3)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), inputs),
        torch.autograd.grad(truth.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    draws = torch.stack(
        [attend(module, *inputs, mask, dropout=0.2, scaling=0.3)[0].detach() for _ in range(2000)]
    )
    error = (draws.mean(0) - truth).abs() / (draws.std(0) / 2000**0.5)
    assert error.max() < 5
    assert draws.std(0).min() > 0


@pytest.mark.parametrize("causal", [True, False])
def test_attend_without_a_fast_path_draws_as_transformers(causal):
    """Causal without a mask, or with fewer keys than queries: the same draws as transformers'."""
    module = nn.Module().train()
    module.is_causal, module.num_key_value_groups = causal, 1 if causal else 2
    heads = 4 if causal else 2
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    key, value = torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 8)
    outputs = []
    for function in (attend, sdpa_attention_forward):
        torch.manual_seed(3)
        outputs.append(function(module, query, key, value, None, dropout=0.4)[0])
    assert torch.equal(*outputs)


def test_prepare_for_cpu_replaces_every_dropout():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    count = sum(type(module) is nn.Dropout for module in model.modules())
    prepare_for_cpu(model, checkpoints=False)
    assert sum(isinstance(module, FastDropout) for module in model.modules()) == count > 2


def test_prepare_for_cpu_leaves_the_attention_of_other_models():
    """The faster attention has a name of its own, which one model's config holds and no file."""
    settings = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    ours, other = BertModel(settings), BertModel(deepcopy(settings))
    prepare_for_cpu(ours, checkpoints=False)
    assert ALL_ATTENTION_FUNCTIONS[ours.config._attn_implementation] is attend
    assert other.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ATTENTION not in ours.config.to_json_string(use_diff=False)
    falcon = FalconModel(FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    prepare_for_cpu(falcon, checkpoints=False)
    assert falcon.config._attn_implementation == "sdpa"  # its code looks for that name


@pytest.mark.parametrize(
    ("load", "busy", "threads", "expected"),
    [
        (4.0, 100, 2, "OMP_NUM_THREADS=1 "),  # as many others as there are threads
        (4.0, 100, 1, None),
        (0.2, 100, 4, None),  # busy for this moment alone
        (4.0, 0, 4, None),  # they have ended
        (2.0, 50, 4, "keep 2.0 of this machine's 4 cores busy, and this run has 4 threads"),
        (2.0, 50, 4, "OMP_NUM_THREADS=2 "),
        (2.0, 50, 2, None),
    ],
)
def test_load_warning_names_busy_cores_and_free_ones(load, busy, threads, expected, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("time.process_time", lambda: 0.0)
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: float(busy))
    warning = load_warning(threads)
    assert expected in warning if expected else warning is None


def test_load_warning_without_measurements_uses_the_load_or_nothing(monkeypatch):
    def unknown(*_):
        raise OSError("not measured")

    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.cpu_percent", unknown)
    assert "keep 4.0 of" in load_warning(4)
    monkeypatch.setattr("os.getloadavg", unknown)
    assert load_warning(4) is None


@pytest.mark.parametrize("kernels", [True, False])
def test_cpu_kernels_switch_decides_about_kernels_and_process_settings(
    kernels, tiny_bert, monkeypatch
):
    calls = []
    monkeypatch.setattr(cpu_kernels, "_return_freed_memory", lambda: calls.append("mallopt"))
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    config = ModelConfig(str(tiny_bert), gradient_checkpointing=True, cpu_kernels=kernels)
    model, _ = load_classifier(config, load_tokenizer(config), ["a", "b"])
    assert any(isinstance(module, FastDropout) for module in model.modules()) == kernels
    assert model.config._attn_implementation == (ATTENTION if kernels else "sdpa")
    assert ("ONEDNN_PRIMITIVE_CACHE_CAPACITY" in os.environ) == kernels
    assert calls == ["mallopt"] * kernels


def test_config_hash_of_earlier_runs_lacks_cpu_kernels():
    config = compose_config(["model.name_or_path=x"])
    earlier = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    del earlier.model.cpu_kernels
    assert config_hash(config) == config_hash(earlier)
    assert config_hash(compose_config(["model.name_or_path=x", "model.cpu_kernels=false"])) != (
        config_hash(earlier)
    )
