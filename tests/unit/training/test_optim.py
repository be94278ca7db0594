"""Optimizers and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import SchedulerType

from lora_lightning.config.schema import OptimConfig
from lora_lightning.lora import UserError
from lora_lightning.training.optim import (
    BY_METRIC,
    adopt_implementation,
    build_optimizer,
    build_scheduler,
)


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    return model


def test_weight_decay_applies_to_matrices_alone():
    model = _model()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(weight_decay=0.3))
    decayed, others = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[2].bias)
    }
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)


def test_loraplus_without_an_adapter_raises():
    with pytest.raises(UserError, match="requires an adapter"):
        build_optimizer(_model().named_parameters(), OptimConfig(loraplus_lr_ratio=16))


def test_optimizer_takes_any_class_of_torch_with_its_options():
    config = OptimConfig(name="SGD", lr=0.5, options={"momentum": 0.9, "nesterov": True})
    optimizer = build_optimizer(_model().named_parameters(), config)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["nesterov"] is True
    assert optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "AdmaW"}, "Did you mean 'AdamW'"),
        ({"options": {"beta": 1}}, "AdamW does not take"),
        ({"options": {"betas": [2.0, 0.9]}}, "AdamW does not take"),
    ],
)
def test_unknown_optimizer_or_option_raises(settings, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(_model().named_parameters(), OptimConfig(**settings))


def _rates(config: OptimConfig, steps: int) -> list[float]:
    optimizer = build_optimizer(_model().named_parameters(), config)
    scheduler = build_scheduler(optimizer, config, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("warmup", [0.1, 2])
def test_warmup_takes_a_fraction_or_a_number_of_steps(warmup):
    rates = _rates(OptimConfig(lr=1.0, warmup=warmup), 20)
    expected = [min(step / 2, (20 - step) / 18) for step in range(21)]
    assert rates == pytest.approx(expected)


def test_cosine_schedule_equals_its_formula():
    rates = _rates(OptimConfig(lr=1.0, warmup=0, scheduler="cosine"), 10)
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)])


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_is_built_and_steps(name):
    config = OptimConfig(lr=1.0, warmup=2, scheduler=name)
    optimizer = build_optimizer(_model().named_parameters(), config)
    scheduler = build_scheduler(optimizer, config, 20, mode="max")
    for step in range(20):
        optimizer.step()
        scheduler.step(*((float(step),) if name in BY_METRIC else ()))
    rate = optimizer.param_groups[0]["lr"]
    least = {"cosine_with_min_lr": 0.1, "linear": 0.0}
    least |= {"cosine": 0.0, "warmup_stable_decay": 0.0, "constant": 1.0, "polynomial": 1e-7}
    if name in least:
        assert rate == pytest.approx(least[name], abs=1e-9)
    if name in BY_METRIC:
        assert rate >= 1.0  # what rises is the best, by the mode
        assert scheduler.mode == "max"


def test_stable_schedule_decays_in_its_last_tenth():
    rates = _rates(OptimConfig(lr=1.0, warmup=0, scheduler="warmup_stable_decay"), 20)
    assert rates[:19] == [1.0] * 19
    assert rates[19] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheduler": "linear", "scheduler_options": {"foo": 1}}, "foo"),
        ({"scheduler": "greedy", "scheduler_options": {"foo": 1}}, "foo"),
        ({"scheduler": "constant", "scheduler_options": {"num_cycles": 2}}, "Leave them out"),
    ],
)
def test_schedule_option_that_is_unknown_raises(settings, said):
    optimizer = build_optimizer(_model().named_parameters(), OptimConfig())
    with pytest.raises(UserError, match=said):
        build_scheduler(optimizer, OptimConfig(**settings), 10)


def test_schedule_that_needs_an_end_without_one_raises():
    optimizer = build_optimizer(_model().named_parameters(), OptimConfig())
    build_scheduler(optimizer, OptimConfig(scheduler="constant_with_warmup", warmup=3), None)
    build_scheduler(optimizer, OptimConfig(scheduler="constant", warmup=0), None)
    for settings in ({}, {"scheduler": "constant_with_warmup", "warmup": 0.5}):
        with pytest.raises(UserError, match=r"trainer.max_steps=N"):
            build_scheduler(optimizer, OptimConfig(**settings), None)


def test_unknown_schedule_raises():
    optimizer = build_optimizer(_model().named_parameters(), OptimConfig())
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        build_scheduler(optimizer, OptimConfig(scheduler="cosin"), 10)


def test_optimizer_on_a_gpu_is_fused_without_loss_scaling(monkeypatch):
    """The meta device stands for the GPU: torch's fused step refuses a device that it lacks."""
    made = {}

    class AdamW(torch.optim.AdamW):
        def __init__(self, params, fused=None, **options):
            made.update(fused=fused, **options)
            super().__init__(params, **options)

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)

    def fused(**settings) -> bool | None:
        scaled = settings.pop("scaled", False)
        config = OptimConfig(**settings)
        build_optimizer(_model().named_parameters(), config, scaled=scaled)
        return made["fused"]

    assert fused() is True
    assert fused(loraplus_lr_ratio=None) is True
    assert fused(scaled=True) is None
    assert fused(options={"fused": False}) is False
    assert fused(options={"capturable": True}) is None
    monkeypatch.setattr(nn.Parameter, "is_cuda", False)
    assert fused() is None


def test_optimizer_state_of_another_device_gives_the_same_step():
    """A checkpoint's groups say `fused`, which a resumed run on a CPU would take over."""
    model = _model()
    saved = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    adopt_implementation(saved["param_groups"], optimizer)
    optimizer.load_state_dict(saved)
    assert [group["fused"] for group in optimizer.param_groups] == [None]
