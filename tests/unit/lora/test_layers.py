"""LoRA layers against float64 references."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from helpers.gpu import ImitatedGpu
from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    LoraConv1D,
    LoraEmbedding,
    LoraLinear,
    UserError,
)
from lora_lightning.lora.functional import low_rank_norm


def filled(layer):
    """The layer with A and B drawn at random."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator) * 0.3)
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.3)
    return layer


def doubles(*tensors):
    return [tensor.detach().double() for tensor in tensors]


def dense_layer(kind, bias=True):
    torch.manual_seed(0)
    if kind == "Conv1D":
        return LoraConv1D(Conv1D(5, 7), 3, scaling=1.7)
    return LoraLinear(nn.Linear(7, 5, bias=bias), 3, scaling=1.7)


def reference(layer, x):
    """W0 x + b + s B A x, in float64 and in no order that the code uses."""
    weight, a, b, x = doubles(layer.base_layer.weight, layer.lora_A, layer.lora_B, x)
    weight = weight.t() if isinstance(layer, LoraConv1D) else weight
    output = torch.einsum("oi,bti->bto", weight + layer.scaling * (b @ a), x)
    bias = layer.base_layer.bias
    return output if bias is None else output + bias.detach().double()


@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
def test_linear_forward_equals_the_equation(kind, bias):
    layer = filled(dense_layer(kind, bias))
    x = torch.randn(2, 4, 7)
    torch.testing.assert_close(layer(x).double(), reference(layer, x), rtol=1e-5, atol=1e-6)
    layer.merge()
    torch.testing.assert_close(layer.base_layer(x), layer(x), rtol=0, atol=0)
    layer.unmerge()
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(
    ("base", "scale"),
    [
        (nn.Embedding(11, 6, padding_idx=0), 1.0),
        (BartScaledWordEmbedding(11, 6, 0, embed_scale=2.5), 2.5),
        (Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5), 2.5),
    ],
    ids=["plain", "bart", "gemma3"],
)
def test_embedding_forward_equals_the_equation(base, scale):
    layer = filled(LoraEmbedding(base, 3, scaling=1.7))
    ids = torch.tensor([[1, 5, 10], [2, 0, 1]])
    weight, a, b = doubles(base.weight, layer.lora_A, layer.lora_B)
    expected = scale * (weight + 1.7 * (b @ a).t())[ids]
    torch.testing.assert_close(layer(ids).double(), expected, rtol=1e-5, atol=1e-6)
    layer.merge()
    torch.testing.assert_close(layer(ids).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("use_rslora", "alpha", "scaling"),
    [(False, 12, 3.0), (True, 12, 6.0), (False, None, 2.0), (True, None, 4.0)],
)
def test_layer_scaling_follows_alpha_and_rank(use_rslora, alpha, scaling):
    config = LoraConfig(rank=4, alpha=alpha, use_rslora=use_rslora, targets=["0"])
    adapter = Adapter(nn.Sequential(nn.Linear(7, 5)), config)
    layer = filled(adapter.layers["0"])
    assert layer.scaling == scaling
    x = torch.randn(2, 4, 7)
    torch.testing.assert_close(layer(x).double(), reference(layer, x), rtol=1e-5, atol=1e-6)


def test_dropout_applies_to_the_update_in_training_only():
    layer = filled(LoraLinear(nn.Linear(7, 5), 3, scaling=1.7, dropout=0.5))
    x = torch.randn(2, 4, 7)
    layer.eval()
    torch.testing.assert_close(layer(x).double(), reference(layer, x), rtol=1e-5, atol=1e-6)

    layer.train()
    torch.manual_seed(3)
    output = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    update = layer.scaling * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(output, layer.base_layer(x) + update)
    assert not torch.equal(output, layer(x))


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5, 7))


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (lambda: nn.Linear(7, 5), {"targets": ["0"]}),
        (lambda: nn.Linear(7, 5), {"targets": ["0"], "init": "gaussian"}),
        (lambda: nn.Linear(7, 5), {"targets": ["0"], "use_dora": True}),
        (lambda: Conv1D(5, 7), {"targets": ["0"]}),
        (lambda: nn.Embedding(11, 6), {"targets": ["0"]}),
        (Bank, {"targets": [], "target_parameters": ["0.weight"]}),
    ],
    ids=["kaiming", "gaussian", "dora", "Conv1D", "embedding", "parameter"],
)
def test_initial_matrices_on_a_gpu_equal_those_on_a_cpu(base, settings):
    def first_values(model):
        torch.manual_seed(4)
        (layer,) = Adapter(model, LoraConfig(rank=2, **settings)).layers.values()
        return layer.lora_A, layer.lora_B, torch.get_rng_state()

    torch.manual_seed(0)
    model = nn.Sequential(base())
    expected = first_values(copy.deepcopy(model))
    with ImitatedGpu() as gpu:
        found = first_values(gpu.take(model))
        assert found[0].device.type == found[1].device.type == "cuda"
    assert all(map(torch.equal, found, expected))
    assert expected[0].any() or expected[1].any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_equal_torch_draws(init):
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(7, 5), 3, scaling=1.0, init=init)
    torch.manual_seed(0)
    nn.Linear(7, 5)
    a = torch.empty(3, 7)
    nn.init.normal_(a, std=1 / 3) if init == "gaussian" else nn.init.kaiming_uniform_(a, 5**0.5)
    assert torch.equal(layer.lora_A, a)
    assert not layer.lora_B.any()


def test_layer_takes_the_mode_of_its_base():
    assert not LoraLinear(nn.Linear(2, 2).eval(), 1, scaling=1.0, dropout=0.5).training
    assert LoraLinear(nn.Linear(2, 2), 1, scaling=1.0, dropout=0.5).training


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapter_on_a_16_bit_base_gives_its_dtype(kind, dtype):
    torch.manual_seed(0)
    if kind == "Linear":
        layer = filled(LoraLinear(nn.Linear(64, 32).to(dtype), 4, scaling=0.5))
        x = torch.randn(2, 4, 64).to(dtype)
        expected = reference(layer, x)
    else:
        layer = filled(LoraEmbedding(nn.Embedding(64, 32).to(dtype), 4, scaling=0.5))
        x = torch.randint(0, 64, (2, 4))
        weight, a, b = doubles(layer.base_layer.weight, layer.lora_A, layer.lora_B)
        expected = (weight + 0.5 * (b @ a).t())[x]
    output = layer(x)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.03)
    output.float().square().sum().backward()
    for tensor in (layer.lora_A, layer.lora_B):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.any()

    weight = layer.base_layer.weight.detach().clone()
    wide = weight.double() + layer.delta_weight().double()
    layer.merge()
    assert layer.base_layer.weight.dtype == dtype
    # One rounding: nothing is further from the exact sum than half a step of the narrow type.
    step = torch.finfo(dtype).eps * wide.abs().clamp_min(1e-3)
    assert ((layer.base_layer.weight.double() - wide).abs() <= 0.51 * step).all()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


class Int8Linear(nn.Module):
    """A quantised linear as libraries make them: integers in a buffer, no floating parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).t()


def test_quantized_linear_trains_and_does_not_merge():
    torch.manual_seed(0)
    model = nn.Sequential(Int8Linear(nn.Linear(8, 6)), nn.Linear(6, 4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = Adapter(model, LoraConfig(rank=2))
    assert list(adapter.layers) == ["0", "1"]
    x, target = torch.randn(32, 8), torch.randn(32, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(layer.lora_B.any() for layer in adapter.layers.values())

    with pytest.raises(UserError, match=r"^0: cannot merge into Int8Linear: .* is quantized"):
        adapter.merge()
    adapter.remove()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_layer_passes_gradcheck(kind):
    if kind == "Embedding":
        layer = LoraEmbedding(nn.Embedding(4, 3), 2, scaling=0.7)
        x = torch.tensor([[0, 3, 3]])
    else:
        layer = dense_layer(kind)
        x = torch.randn(1, 2, 7, dtype=torch.float64, requires_grad=True)
    layer = filled(layer.double())

    def output(a, b, x):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(output, (layer.lora_A, layer.lora_B, x))


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_update_norm_equals_the_dense_norm(kind):
    layer = filled(dense_layer(kind))
    a, b = doubles(layer.lora_A, layer.lora_B)
    dense = torch.linalg.norm(1.7 * (b @ a)).item()
    assert layer.update_norm().item() == pytest.approx(dense, rel=1e-5)
    assert torch.linalg.norm(layer.delta_weight()).item() == pytest.approx(dense, rel=1e-5)
    assert layer.delta_weight().shape == layer.base_layer.weight.shape
    assert low_rank_norm(layer.lora_A, torch.zeros_like(layer.lora_B), 2.0).item() == 0.0


def test_layer_initial_values_follow_init():
    torch.manual_seed(0)
    linear = nn.Linear(400, 300)
    layer = LoraLinear(linear, 16, scaling=1.0)
    bound = 1 / math.sqrt(400)  # Kaiming with a = sqrt(5): the first values of nn.Linear too
    assert layer.lora_A.abs().max().item() <= bound
    assert layer.lora_A.abs().max().item() > 0.99 * bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(layer.lora_A.mean().item()) < 0.03 * bound
    assert not layer.lora_B.any()

    gaussian = LoraLinear(linear, 16, scaling=1.0, init="gaussian")
    assert gaussian.lora_A.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert not gaussian.lora_B.any()

    embedding = LoraEmbedding(nn.Embedding(400, 300), 16, scaling=1.0)
    assert not embedding.lora_A.any()
    assert embedding.lora_B.std().item() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_merge_of_values_not_finite_raises(value):
    layer = filled(dense_layer("Linear"))
    weight = layer.base_layer.weight
    with torch.no_grad():
        layer.lora_B.fill_(value)
        layer.lora_A.mul_(100)
    with pytest.raises(UserError, match="not finite"):
        layer.merge()
    assert layer.base_layer.weight is weight
    assert not layer.merged


def test_merge_a_hundred_times_is_exact():
    layer = filled(dense_layer("Linear"))
    before = layer.base_layer.weight.detach().clone()
    for _ in range(100):
        layer.merge()
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_merged_layer_converted_unmerges_in_the_new_dtype():
    layer = filled(dense_layer("Linear"))
    pristine = layer.base_layer.weight
    expected = pristine.detach().to(torch.bfloat16)
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.base_layer.weight is pristine
    torch.testing.assert_close(pristine, expected, rtol=0, atol=0)
    layer.merge()
    layer.to("meta").unmerge()
    assert {tensor.device.type for tensor in layer.parameters()} == {"meta"}


def test_wrapper_attributes_are_the_base_layers():
    layer = dense_layer("Linear")
    assert layer.in_features == 7
    assert layer.weight is layer.base_layer.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing()


@pytest.fixture
def _default_of_16_bits():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


class Mixture(nn.Module):
    """One of each that an adapter can be on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(9, 6), nn.Linear(6, 6), Conv1D(6, 6)
        self.vocabulary, self.head = nn.Embedding(9, 6), nn.Linear(6, 2)
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.ones(3, 6, 6))


@pytest.mark.usefixtures("_default_of_16_bits")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["weights"], "trainable_token_indices": {"vocabulary": [2, 4]}},
        {"use_dora": True},
        {"parts": {"linear": {"q": 4, "k": 2}}},
        {"init": "pissa", "targets": ["linear", "conv"]},
        {"init": "gaussian"},
    ],
    ids=str,
)
def test_adapter_is_fp32_under_any_default_dtype(settings):
    settings = {"targets": ["embed", "linear", "conv"], "modules_to_save": ["head"], **settings}
    made = []
    for default in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        base = Mixture().to(torch.bfloat16)
        for parameter in base.parameters():
            nn.init.constant_(parameter, 0.5)
        base.linear.weight.data += torch.eye(6, dtype=torch.bfloat16)
        torch.set_default_dtype(default)
        made.append(Adapter(base, LoraConfig(rank=2, **settings)).named_tensors())
        torch.set_default_dtype(torch.bfloat16)
    assert {tensor.dtype for tensor in made[0].values()} == {torch.float32}
    for name, tensor in made[0].items():
        assert torch.equal(tensor, made[1][name]), name
