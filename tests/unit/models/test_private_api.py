"""Private APIs of transformers and torch are still there, and do what this package expects."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM
from transformers.integrations import moe

from lora_lightning.models import private_api

VERSIONS = (
    f"checked with {private_api.CHECKED}; installed: transformers {transformers.__version__}, "
    f"torch {torch.__version__}"
)
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("transformers.masking_utils", "find_packed_sequence_indices"),
        ("transformers.masking_utils", "is_tracing"),
        ("transformers.masking_utils", "sdpa_mask"),
        ("transformers.integrations.moe", "_grouped_mm"),
        ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
        ("transformers.modeling_layers", "GradientCheckpointingLayer"),
        ("transformers.utils.hub", "cached_file"),
        ("transformers.utils.peft_utils", "find_adapter_config_file"),
        ("transformers.PreTrainedModel", "_can_set_attn_implementation"),
        ("torch._utils", "_unflatten_dense_tensors"),
        ("torch", "_foreach_copy_"),
        ("torch", "_foreach_mul_"),
        ("torch.Tensor", "_base"),
        ("torch.Tensor", "_version"),
    ],
)
def test_private_name_exists(owner, name):
    import importlib

    try:
        holder = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, leaf = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), leaf)
    assert hasattr(holder, name), f"{owner}.{name} is gone: {VERSIONS}"


@pytest.mark.parametrize(
    "name",
    [
        *("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set"),
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        "_compiled_call_impl",
    ],
)
def test_private_attribute_of_modules_exists(name):
    assert hasattr(nn.Linear(2, 2), name), f"nn.Module.{name} is gone: {VERSIONS}"


def test_kernel_names_are_read_and_set_in_a_config():
    model = BertModel(BertConfig(**SMALL))
    config = copy.deepcopy(model.config)
    assert private_api.attention_of(config) == "sdpa", VERSIONS
    private_api.set_kernels(config, attention="eager")
    assert private_api.attention_of(config) == "eager", VERSIONS
    assert private_api.experts_of(config) is None
    assert private_api.can_set_attention(model), VERSIONS
    assert private_api.attention_of(None) is None


def test_compiled_modules_and_views_of_parameters_are_recognized():
    layer = nn.Linear(2, 2)
    assert not private_api.is_compiled(layer)
    layer.compile()
    assert private_api.is_compiled(layer), VERSIONS
    assert private_api.is_view_of_parameter(layer.weight.t()), VERSIONS
    assert not private_api.is_view_of_parameter(torch.ones(2, 2).t())


def test_fake_tensors_have_a_shape_and_no_values():
    with private_api.fake_tensors():
        product = torch.empty(2, 3, device="cuda") @ torch.empty(3, 4, device="cuda")
    assert (product.shape, product.device.type) == ((2, 4), "cuda"), VERSIONS


def test_replaced_functions_are_called_and_restored(monkeypatch):
    """Packing detection and masks: transformers looks the functions up where we replace them."""
    from transformers import masking_utils

    model = BertModel(BertConfig(**SMALL, is_decoder=True)).eval()
    ids = torch.ones(1, 4, dtype=torch.long)
    asked = []
    original, find = masking_utils.is_tracing, masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *a: asked.append(a) or original(*a))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model(**inputs)
    assert asked, f"no mask asks is_tracing: {VERSIONS}"
    count, before = len(asked), masking_utils.is_tracing
    with private_api.masks_without_waiting(torch.device("cuda")):
        model(**inputs)
        assert len(asked) == count
    with private_api.unpacked_rows():
        assert masking_utils.find_packed_sequence_indices(ids) is None
    assert masking_utils.is_tracing is before
    assert masking_utils.find_packed_sequence_indices is find


def test_first_expert_only_replaces_the_grouped_matmul_of_experts(monkeypatch):
    config = MixtralConfig(
        **SMALL, vocab_size=9, intermediate_size=8, num_key_value_heads=1, num_local_experts=2
    )
    config._experts_implementation = "grouped_mm"
    model, ids, calls = MixtralForCausalLM(config).eval(), torch.tensor([[1, 2, 3]]), []
    original = moe._grouped_mm
    monkeypatch.setattr(moe, "_grouped_mm", lambda *a, **k: calls.append(1) or original(*a, **k))
    model(input_ids=ids)
    count = len(calls)
    assert count, f"experts do not call moe._grouped_mm: {VERSIONS}"
    with private_api.first_expert_only():
        assert model(input_ids=ids).logits.isfinite().all()
    assert len(calls) == count
