"""A stacked layer against each slot's own layer, in float64."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from lora_lightning.lora import (
    Adapter,
    LoraConfig,
    UserError,
    products,
)
from lora_lightning.lora.batched import Stack, StackedLayer, stacked_model

CONFIGS = (
    LoraConfig(rank=1, targets=["0", "2"]),
    LoraConfig(rank=3, alpha=1.0, targets=["0"]),
    LoraConfig(rank=32, targets=["0", "2"], bias="lora_only"),
    LoraConfig(rank=4, targets=["0", "3"], modules_to_save=["2"]),
)


def slots() -> dict[int, nn.Module]:
    """Models with one frozen base and an adapter each, of which no B is zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Linear(6, 4)).double()
    base.requires_grad_(False)
    frozen = {id(parameter): parameter for parameter in base.parameters()}
    models = {}
    for number, config in enumerate(CONFIGS):
        model = copy.deepcopy(base)
        adapter = Adapter(model, config)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64)
            elif not parameter.requires_grad:
                own = base.get_parameter(name.replace(".base_layer", ""))
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, own)
        assert id(next(iter(adapter.layers.values())).base_layer.weight) in frozen
        models[number] = model
    return models


@pytest.fixture(params=[False, True], ids=["one by one", "grouped"])
def grouped(request, monkeypatch):
    """Whether the low-rank products of all slots are one, as on a GPU."""
    monkeypatch.setattr(products, "GROUPED_ON", ("cpu",) if request.param else ())


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1], [3, 0], [0, 1]])
def test_stacked_model_equals_each_slot_alone(chosen, grouped):
    models = slots()
    stack = Stack()
    stacked = stacked_model(models, stack)
    x = torch.randn(len(chosen), 2, 3, 5, dtype=torch.float64)
    weights = torch.randn(len(chosen), 2, 3, 4, dtype=torch.float64)

    alone, truth, inputs = [], {}, []
    for index, number in enumerate(chosen):
        rows = x[index].clone().requires_grad_()
        alone.append(models[number](rows))
        (alone[-1] * weights[index]).sum().backward()
        inputs.append(rows.grad)
        for name, parameter in models[number].named_parameters():
            truth[number, name] = parameter.grad
            parameter.grad = None
    rows = x.flatten(0, 1).requires_grad_()
    with stack.of(chosen):
        output = stacked(rows)
    torch.testing.assert_close(output, torch.cat(alone), rtol=1e-12, atol=1e-12)
    (output * weights.flatten(0, 1)).sum().backward()
    torch.testing.assert_close(rows.grad, torch.cat(inputs), rtol=1e-12, atol=1e-12)
    compared = 0
    for number in chosen:
        for name, parameter in models[number].named_parameters():
            expected = truth[number, name]
            assert (parameter.grad is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)
                compared += 1
    assert compared >= 2 * len(chosen)


def test_stacked_model_dropout_uses_each_slots_generator(grouped):
    """With the same draws as alone, outputs and gradients are the same."""
    torch.manual_seed(0)
    base = nn.Linear(5, 7).double().requires_grad_(False)
    rates, ranks = (0.5, 0.0, 0.25), (2, 5, 3)
    layers: dict[int, nn.Module] = {}
    for number, (rate, rank) in enumerate(zip(rates, ranks, strict=True)):
        model = nn.Sequential(copy.deepcopy(base))
        Adapter(model, LoraConfig(rank=rank, targets=["0"], dropout=rate))
        layer = model[0].train()
        layer.base_layer.weight, layer.base_layer.bias = base.weight, base.bias
        for matrix in (layer.lora_A, layer.lora_B):
            matrix.data = torch.randn_like(matrix, dtype=torch.float64)
        layers[number] = layer

    def seeded(slot: int):
        context = torch.random.fork_rng(devices=[])
        stack = contextlib.ExitStack()
        stack.enter_context(context)
        torch.manual_seed(slot)
        return stack

    x = torch.randn(6, 4, 5, dtype=torch.float64)
    weights = torch.randn(6, 4, 7, dtype=torch.float64)
    truth = []
    for number, layer in layers.items():
        rows = x[2 * number : 2 * number + 2].clone().requires_grad_()
        with seeded(number):
            output = layer(rows)
        (output * weights[2 * number : 2 * number + 2]).sum().backward()
        truth.append((output, rows.grad, layer.lora_A.grad, layer.lora_B.grad))
        layer.zero_grad()
    together = StackedLayer(layers, stack := Stack(randomness=seeded))
    rows = x.clone().requires_grad_()
    with stack.of([0, 1, 2]):
        output = together(rows)
    (output * weights).sum().backward()
    for number, layer in layers.items():
        part = slice(2 * number, 2 * number + 2)
        found = (output[part], rows.grad[part], layer.lora_A.grad, layer.lora_B.grad)
        for ours, expected in zip(found, truth[number], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_stacked_layer_after_inference_mode_trains(grouped):
    """A pass in inference mode leaves nothing behind that a backward pass cannot use."""
    models = slots()
    stack = Stack()
    stacked = stacked_model(models, stack)
    x = torch.randn(2, 5, dtype=torch.float64)
    with torch.inference_mode(), stack.of([0]):
        stacked(x)
    truth = torch.autograd.grad(models[0](x).sum(), models[0].get_submodule("0").lora_A)
    with stack.of([0]):
        found = torch.autograd.grad(stacked(x).sum(), models[0].get_submodule("0").lora_A)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_stacked_model_computes_one_base_product(monkeypatch):
    """Where all adapt a layer with plain frozen weights, it is computed once."""
    models = slots()
    stack = Stack()
    layers = {number: models[number].get_submodule("0") for number in (0, 1, 3)}
    layer = StackedLayer(layers, stack)
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        "torch.nn.functional.linear", lambda *args: calls.append(args[0].shape) or linear(*args)
    )
    with stack.of([0, 1, 3]):
        layer(torch.randn(6, 5, dtype=torch.float64))
    assert calls == [(6, 5)]


def test_stacked_model_shares_frozen_tensors():
    models = slots()
    stacked = stacked_model(models, Stack())
    frozen = {id(p) for p in models[0].parameters() if not p.requires_grad}
    assert {id(parameter) for parameter in stacked.parameters()} <= frozen | {
        id(p) for model in models.values() for p in model.parameters()
    }


def test_stacked_model_that_mixes_rows_raises():
    stack = Stack()
    stacked = stacked_model(slots(), stack)
    with stack.of([0, 1]), pytest.raises(UserError, match="mixes rows"):
        stacked(torch.randn(5, 5, dtype=torch.float64))
