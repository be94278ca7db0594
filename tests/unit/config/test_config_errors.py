"""Wrong settings: one message that names the setting and the fix, before anything is loaded."""

from __future__ import annotations

import math

import pytest

from lora_lightning.config.compose import compose_config, settings_of, with_direction
from lora_lightning.config.schema import DataConfig, ModelConfig, OptimConfig
from lora_lightning.lora import LoraConfig, UserError

NAN = math.nan
# A dataclass, its wrong arguments, and what its error says: the setting, and the fix.
WRONG_VALUES = [
    (LoraConfig, {"rank": 0}, "lora.rank", "at least 1"),
    (LoraConfig, {"alpha": -1}, "lora.alpha", "positive"),
    (LoraConfig, {"alpha": NAN}, "lora.alpha", "positive"),
    (LoraConfig, {"dropout": 1.5}, "lora.dropout", "[0, 1)"),
    (LoraConfig, {"bias": "lora"}, "lora.bias", "'lora_only'"),
    (LoraConfig, {"init": "kaming"}, "lora.init", "'kaiming'"),
    (LoraConfig, {"targets": "(query"}, "lora.targets", "regular expression"),
    (LoraConfig, {"init": "eva", "eva_rho": 0.5}, "lora.eva_rho", "at least 1"),
    (LoraConfig, {"init": "eva", "parts": {"query": ["a", "b"]}}, "lora.parts", "lora.init=eva"),
    (
        LoraConfig,
        {"target_parameters": ["query.weight"], "dropout": 0.1},
        "lora.target_parameters: not supported",
        "lora.dropout=0.1",
    ),
    (DataConfig, {"batch_size": 0}, "data.batch_size", "at least 1"),
    (DataConfig, {"val_fraction": 1.2}, "data.val_fraction", "[0, 1)"),
    (
        DataConfig,
        {"val_fraction": 0.5, "test_fraction": 0.5},
        "must be below 1 together",
        "data.val_fraction",
    ),
    (ModelConfig, {"name_or_path": "x", "dtype": "bfloat"}, "model.dtype", "'bfloat16'"),
    (
        ModelConfig,
        {"name_or_path": "x", "new_tokens": ["aa", "aa"]},
        "model.new_tokens: must name",
        "each token once, not 'aa' twice",
    ),
    (
        ModelConfig,
        {"name_or_path": "x", "new_tokens": [""]},
        "that are not empty",
        '["<think>","</think>"]',
    ),
    (OptimConfig, {"lr": -1.0}, "optim.lr", "must be above 0"),
    (OptimConfig, {"lr": NAN}, "optim.lr", "must be above 0"),
    (OptimConfig, {"lr": 1e38}, "optim.lr", "at most 1e+30"),
    (OptimConfig, {"weight_decay": math.inf}, "optim.weight_decay", "finite"),
    (OptimConfig, {"weight_decay": -1.0}, "optim.weight_decay", "must be at least 0"),
]
# Overrides, and what the error says.
WRONG_OVERRIDES = [
    (["tags=[a"], "tags=[a", "in quotes"),
    (["loras=default"], "loras", "'lora'"),
    (["experiment=sst"], "experiment=sst", "sst2"),
    (["test_before=maybe"], "test_before", "valid bool"),
    (["lora.rank.x=1"], "lora.rank", "Integer"),
    (["trainer.epochs=1"], "trainer.epochs", "max_epochs"),
    (["lora.method=ful"], "lora.method", "full"),
    (["lora.rank_pattern={query:4}"], "lora.rank_pattern", "'+lora.rank_pattern={"),
    (["model.new_tokens=aa"], "model.new_tokens", "list"),
    (["model=hub"], "model.name_or_path", "must be set"),
    (["seed=-1"], "seed=-1: must be", "from 0"),
    (["task.text_column=${oc.env:NOT_SET_HERE}"], "task.text_column", "'NOT_SET_HERE' not found"),
    (["data.val=${nothing}"], "data.val", "'nothing' not found"),
    (["+foo.bar=1"], "foo: unknown group", "Groups: model"),
    (["+datamodule._target_=missing.Class"], "datamodule: unknown group", "Groups: model"),
    (["task.mode=up"], "task.mode", "max or min"),
    (["task.monitor=val/loss", "task.mode=max"], "task.mode=max", "Remove task.mode"),
    (
        ["task.mode=min"],
        "not supported with val/accuracy, where higher is better",
        "Remove task.mode",
    ),
]


def assert_one_message(error: UserError, says: str, fix: str) -> None:
    """Check a message: one line that names what is wrong, and the fix."""
    text = str(error)
    assert len(text.splitlines()) == 1
    assert len(text) < 1200
    assert says in text
    assert fix in text


@pytest.mark.parametrize(
    ("kind", "arguments", "says", "fix"),
    WRONG_VALUES,
    ids=[
        f"{kind.__name__}-{','.join(given)}-{at}"
        for at, (kind, given, *_) in enumerate(WRONG_VALUES)
    ],
)
def test_dataclass_with_a_wrong_value_raises(kind, arguments, says, fix):
    with pytest.raises(UserError) as raised:
        kind(**arguments)
    assert_one_message(raised.value, says, fix)


@pytest.mark.parametrize(
    ("overrides", "says", "fix"),
    WRONG_OVERRIDES,
    ids=[" ".join(given) for given, *_ in WRONG_OVERRIDES],
)
def test_config_with_a_wrong_override_raises(overrides, says, fix):
    with pytest.raises(UserError) as raised:
        settings_of(with_direction(compose_config(overrides)))
    assert_one_message(raised.value, says, fix)
