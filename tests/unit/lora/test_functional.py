"""The fused step: the same numbers as the plain one, from fewer passes over memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers.pytorch_utils import Conv1D

from helpers.gpu import Kernels, like_a_gpu
from lora_lightning.lora import Adapter, LoraConfig, functional, fused_group
from lora_lightning.lora.functional import add_low_rank, fused_linear
from lora_lightning.lora.layers.linear import LoraConv1D, LoraLinear


def made(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64, adapter=None, *, grad_x=True, rows=(3, 5), bias=True):
    adapter = adapter or dtype
    x = made(*rows, 7, dtype=dtype).requires_grad_(grad_x)
    weight, offset = made(6, 7, dtype=dtype), made(6, dtype=dtype) if bias else None
    a = made(2, 7, dtype=adapter).requires_grad_()
    b = made(6, 2, dtype=adapter, seed=1).requires_grad_()
    return x, weight, offset, a, b


def plain(x, weight, bias, a, b, *, scaling):
    return add_low_rank(nn.functional.linear(x, weight, bias), x, a, b, scaling)


def grads(function, tensors, **kwargs):
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    output = function(*tensors, **kwargs)
    found = torch.autograd.grad(output.double().sin().sum(), wanted)
    return [output, *found]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad_x", [True, False])
@pytest.mark.parametrize("rows", [(3, 5), (4,), (1, 1), (0, 5)])
def test_fused_linear_passes_gradcheck(bias, grad_x, rows):
    x, weight, offset, a, b = inputs(bias=bias, grad_x=grad_x, rows=rows)

    def step(x, a, b):
        return fused_linear(x, weight, offset, a, b, scaling=1.7)

    assert torch.autograd.gradcheck(step, (x, a, b))


@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["once", "twice"]
)
def test_fused_linear_with_dropout_has_exact_derivatives(check):
    x, weight, offset, a, b = inputs()

    def step(x, a, b):
        torch.manual_seed(3)
        return fused_linear(x, weight, offset, a, b, scaling=1.7, dropout=0.4)

    assert check(step, (x, a, b))


@pytest.mark.parametrize("grad_x", [True, False])
def test_fused_linear_equals_plain_operations_in_float64(grad_x):
    tensors = inputs(grad_x=grad_x)
    for found, expected in zip(
        grads(fused_linear, tensors, scaling=0.5), grads(plain, tensors, scaling=0.5), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_linear_in_16_bits_is_as_accurate_as_plain_operations(dtype):
    """fp32 adapters; the truth is float64 on the same rounded values."""
    tensors = inputs(dtype, torch.float32, rows=(64,))
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    truth = grads(plain, wide, scaling=0.5)
    fused, usual = (grads(step, tensors, scaling=0.5) for step in (fused_linear, plain))
    assert [t.dtype for t in fused] == [dtype, dtype, torch.float32, torch.float32]
    for found, other, true in zip(fused, usual, truth, strict=True):
        error, usual_error = (found - true).norm(), (other - true).norm()
        assert error <= 1.25 * usual_error
        assert error <= 0.02 * true.norm()


@pytest.mark.parametrize("scaling", [2.0, 1.7])
def test_fused_linear_on_a_gpu_launches_only_products(scaling, monkeypatch):
    """bf16 base, fp32 adapter: no pass for the scaling, types of gradients or their layout."""
    like_a_gpu(monkeypatch)
    tensors = inputs(torch.bfloat16, torch.float32, rows=(64,), bias=False)
    x, _, _, a, b = tensors
    wide = [
        t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    ]
    grad = made(64, 6, dtype=torch.bfloat16)
    truth = torch.autograd.grad(plain(*wide, scaling=scaling), wide[:1] + wide[3:], grad.double())
    with Kernels() as forward:
        output = fused_linear(*tensors, scaling=scaling)
    # The base product, A x, and B (A x) on top; A and B in bf16.
    expected = {"mm.default": 1, "addmm.default": 1, "addmm_.default": 1, "_to_copy.default": 2}
    assert forward.count == Counter(expected)
    with Kernels() as backward:
        output.backward(grad)
    # g W, g B and its product with A on top; the gradients of A and B.
    expected = {"mm.default": 1, "addmm.default": 1, "addmm_.default": 1, "mm.dtype": 2}
    assert backward.count == Counter(expected)
    assert b.grad.stride() == b.stride()
    for tensor, true in zip((x, a, b), truth, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert (tensor.grad.double() - true).norm() <= 0.01 * true.norm()


def test_fused_linear_saves_the_input_once():
    layer = LoraLinear(nn.Linear(64, 256).requires_grad_(False), 4, scaling=1.0)
    x = made(8, 64, dtype=torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    kept.pop(layer.base_layer.weight.untyped_storage().data_ptr())
    assert kept.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(kept.values()) == 4 * (4 * 64 + 256 * 4 + 8 * 4)  # A, B and A x


def count_calls(monkeypatch):
    calls = []
    real = functional._FusedLinear.apply
    monkeypatch.setattr(
        functional._FusedLinear, "apply", lambda *args: calls.append(1) or real(*args)
    )
    return calls


def layers():
    torch.manual_seed(0)
    linear, conv = nn.Linear(7, 6), Conv1D(6, 7)
    made = [LoraLinear(linear, 2, scaling=0.5), LoraConv1D(conv, 2, scaling=0.5)]
    for layer in made:
        layer.base_layer.requires_grad_(False)
        nn.init.normal_(layer.lora_B)
    return made


@pytest.mark.parametrize("index", [0, 1], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("autocast", [False, True])
def test_plain_layer_uses_the_fused_step(index, autocast, monkeypatch):
    layer = layers()[index]
    calls = count_calls(monkeypatch)
    x = made(4, 7, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x)
        expected = add_low_rank(layer.base_layer(x), x, layer.lora_A, layer.lora_B, 0.5)
    assert calls == [1]
    assert output.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = 0.03 if autocast else 1e-6
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for gradient in torch.autograd.grad(output.sum(), (x, layer.lora_A, layer.lora_B)):
        assert gradient.dtype == torch.float32
        assert gradient.any()


def hook(layer):
    layer.base_layer.register_forward_hook(lambda *_: None)


def train_bias(layer):
    layer.base_layer.bias.requires_grad_(True)


def subclass(layer):
    layer.base_layer.__class__ = type("Quantised", (nn.Linear,), {})


@pytest.mark.parametrize("change", [hook, train_bias, subclass])
def test_layer_that_does_more_is_called(change, monkeypatch):
    layer = layers()[0]
    change(layer)
    calls = count_calls(monkeypatch)
    x = made(4, 7, dtype=torch.float32)
    expected = add_low_rank(layer.base_layer(x), x, layer.lora_A, layer.lora_B, 0.5)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert calls == []


def test_fused_linear_under_checkpointing_is_equal():
    from torch.utils.checkpoint import checkpoint

    first, _ = layers()
    x = made(4, 7, dtype=torch.float32).requires_grad_()
    wanted = (x, first.lora_A, first.lora_B)
    expected = torch.autograd.grad(first(x).sin().sum(), wanted)
    found = torch.autograd.grad(checkpoint(first, x, use_reentrant=False).sin().sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# Second derivatives, hooks, and torch.func -----------------------------------------------------


def grouped(x, weight, bias, a, b, *, scaling):
    """Two layers with one input, as one step."""
    low = a.to(x.dtype)
    layers = [
        fused_group.Linear(weight, bias, a, b, b.to(x.dtype).detach(), scaling),
        fused_group.Linear(2 * weight, None, a, b, b.to(x.dtype).detach(), scaling),
    ]
    first, second = fused_group.fused_group(x, layers, torch.cat([low, low]).detach())
    return first.sin() + second


def grouped_plainly(x, weight, bias, a, b, *, scaling):
    second = plain(x, 2 * weight, None, a, b, scaling=scaling)
    return plain(x, weight, bias, a, b, scaling=scaling).sin() + second


@pytest.mark.parametrize(
    ("step", "truth"), [(fused_linear, plain), (grouped, grouped_plainly)], ids=["one", "group"]
)
@pytest.mark.parametrize("bent", [False, True])
def test_second_derivatives_equal_plain_operations(step, truth, bent):
    """Of a loss that is linear in the output too, whose gradient needs none itself."""

    def second(function):
        tensors = inputs()
        x, _, _, a, b = tensors
        output = function(*tensors, scaling=1.7)
        loss = output.sin().sum() if bent else output.sum()
        first = torch.autograd.grad(loss, (x, a, b), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, a, b))

    for found, expected in zip(second(step), second(truth), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives_without_saved_inputs_raise():
    x, weight, offset, a, b = inputs()
    output = fused_linear(x, weight, offset, a.requires_grad_(False), b, scaling=1.0)
    with pytest.raises(RuntimeError, match=r"second derivatives need .*set_fused\(False\)"):
        torch.autograd.grad(output.sum(), (x, b), create_graph=True)


def network(*, freeze_A=False) -> Adapter:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    adapter = Adapter(model, LoraConfig(rank=2, freeze_A=freeze_A))
    adapter.model.double()
    for layer in adapter.layers.values():
        nn.init.normal_(layer.lora_B, std=0.5)
    return adapter


def adapted_inner_step(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """The loss after one step of gradient descent, as MAML takes it."""
    slow = {name: t for name, t in adapter.model.named_parameters() if t.requires_grad}
    loss = functional_call(adapter.model, slow, x).square().mean()
    grads = torch.autograd.grad(loss, slow.values(), create_graph=True)
    fast = {name: t - 0.3 * g for (name, t), g in zip(slow.items(), grads, strict=True)}
    return functional_call(adapter.model, fast, x).sum()


@pytest.mark.parametrize("freeze_A", [False, True])
def test_gradients_through_a_descent_step_are_exact(freeze_A):
    x = made(5, 4)
    found = []
    for fused in (not freeze_A, False):
        adapter = network(freeze_A=freeze_A)
        adapter.set_fused(fused)
        trained = [t for t in adapter.model.parameters() if t.requires_grad]
        found.append(torch.autograd.grad(adapted_inner_step(adapter, x), trained))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_with_torch_func_are_exact():
    """vmap over grad equals a backward pass for each row."""
    adapter, x = network(), made(5, 4)
    adapter.set_fused(False)
    trained = {n: t.detach() for n, t in adapter.model.named_parameters() if t.requires_grad}

    def loss(tensors, row):
        return functional_call(adapter.model, tensors, row).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for index, row in enumerate(x):
        adapter.model.zero_grad()
        adapter.model(row).square().sum().backward()
        for name, tensor in adapter.model.named_parameters():
            if tensor.requires_grad:
                torch.testing.assert_close(found[name][index], tensor.grad)


def test_full_backward_hooks_on_the_base_layer_run():
    adapter, seen = network(), []
    base = adapter.layers["2"].base_layer
    base.register_full_backward_hook(lambda _, __, grads: seen.append(grads[0]))
    adapter.model(made(5, 4)).sum().backward()
    assert torch.equal(seen[0], torch.ones(5, 2, dtype=torch.float64))


def test_set_fused_false_calls_every_base_layer():
    adapter, x = network(), made(5, 4)
    expected, called = adapter.model(x), []
    forward = nn.Linear.forward
    adapter.set_fused(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: called.append(1) or forward(self, x))
        torch.testing.assert_close(adapter.model(x), expected)
        assert len(called) == 2
        adapter.set_fused(True)
        adapter.model(x)
    assert len(called) == 2
