"""Settings of an adapter: their ranges, their conflicts, and what follows from them."""

from __future__ import annotations

import pytest

from lora_lightning.lora import LoraConfig, UserError
from lora_lightning.lora.config_checks import CONFLICTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank=0: must be a whole number of at least 1"),
        ({"rank": 2.5}, "lora.rank=2.5: must be a whole number"),
        ({"rank": True}, "lora.rank=True: must be a whole number"),
        ({"alpha": -1}, "lora.alpha=-1: must be a positive number"),
        ({"alpha": float("nan")}, "lora.alpha=nan: must be a positive number"),
        ({"alpha_ratio": 0}, "lora.alpha_ratio=0: must be a positive number"),
        ({"scale": 0}, "lora.scale=0: must be a positive number"),
        ({"scale": 2.0, "alpha": 8}, "lora.scale=2: not supported with lora.alpha=8,"),
        (
            {"scale": 2.0, "alpha_ratio": 1.0},
            "lora.scale=2: not supported with lora.alpha_ratio=1,",
        ),
        (
            {"init": "olora", "freeze_A": True},
            "lora.freeze_A=true: not supported with lora.init=olora",
        ),
        ({"dropout": 1.0}, "lora.dropout=1.0: must be a number in"),
        ({"dropout": "much"}, "lora.dropout='much': must be a number in"),
        ({"bias": "some"}, "lora.bias='some': must be one of none, all, lora_only"),
        ({"init": "kaimin"}, "Did you mean 'kaiming'?"),
        ({"targets": []}, "lora.targets is empty"),
        ({"targets": "q_(proj"}, "lora.targets: .* is not a valid regular expression"),
        ({"targets": [1]}, r"lora.targets=\[1\]: must be a string or a list of names"),
        ({"rank_pattern": {"q_proj": 0}}, r"lora.rank_pattern\['q_proj'\]=0: must be"),
        ({"alpha_pattern": {"q_proj": 0}}, r"lora.alpha_pattern\['q_proj'\]=0: must be"),
        ({"rank_pattern": {"(": 1}}, "not a valid regular expression"),
        *[
            ({n: "q"}, f"lora.{n}='q': must be a mapping")
            for n in ("rank_pattern", "alpha_pattern")
        ],
        ({"parts": "q"}, "lora.parts='q': must be a mapping"),
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"init": "pissa_niter_0"}, "lora.init='pissa_niter_0': must be one of"),
        ({"layers": []}, r"lora.layers=\[\]: must be a list of layer indices"),
        ({"layers_pattern": "layers"}, "lora.layers_pattern: requires lora.layers"),
        ({"layers": [0], "layers_pattern": "("}, "not a valid regular expression"),
    ],
)
def test_config_value_out_of_range_raises(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_config_several_mistakes_are_reported_together():
    with pytest.raises(UserError) as out_of_range:
        LoraConfig(rank=0, dropout=1.5, rank_pattern={"q": 0})
    assert str(out_of_range.value).splitlines() == [
        "lora.rank=0: must be a whole number of at least 1.",
        "lora.dropout=1.5: must be a number in [0, 1).",
        "lora.rank_pattern['q']=0: must be a whole number of at least 1.",
    ]
    with pytest.raises(UserError) as conflicts:
        LoraConfig(target_parameters=["mlp.experts"], use_dora=True, dropout=0.1, bias="all")
    lines = str(conflicts.value).splitlines()
    others = ["lora.use_dora=true", "lora.dropout=0.1", "lora.bias=all"]
    resets = ["lora.use_dora=false", "lora.dropout=0", "lora.bias=none"]
    assert len(lines) == 3
    for line, other, reset in zip(lines, others, resets, strict=True):
        assert line.startswith(f"lora.target_parameters: not supported with {other}, ")
        assert line.endswith(f". Set {reset} or lora.target_parameters=[].")


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: f"{c.setting}-{c.other}")
def test_config_each_conflict_is_reported(conflict):
    values = {
        **{"scale": 2.0, "alpha": 8, "alpha_ratio": 1.0, "freeze_A": True, "use_dora": True},
        **{"parts": {"qkv": ["q", "k"]}, "target_parameters": ["w"], "dropout": 0.1, "bias": "all"},
    }
    first = {conflict.setting: values[conflict.setting]}
    for prefix in conflict.values:
        second = {conflict.other: prefix or values[conflict.other]}
        with pytest.raises(UserError, match=f"not supported with lora.{conflict.other}="):
            LoraConfig(**first, **second)
    LoraConfig(**first)


@pytest.mark.parametrize(
    ("given", "names"), [("classifier", ["classifier"]), ("a, b.c", ["a", "b.c"]), (None, [])]
)
def test_config_single_name_becomes_a_list(given, names):
    config = LoraConfig(modules_to_save=given, target_parameters=given)
    assert (config.modules_to_save, config.target_parameters) == (names, names)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_config_exported_keeps_the_scaling(use_rslora):
    for scaling in ({"scale": 1.5}, {"alpha": 3.0}, {"alpha_ratio": 0.5}):
        config = LoraConfig(rank=4, init="pissa", use_rslora=use_rslora, **scaling)
        exported = config.exported()
        assert exported.rank == 8
        assert exported.scaling_of("q") == pytest.approx(config.scaling_of("q"), rel=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_config_scale_is_the_scaling_at_every_rank(use_rslora):
    config = LoraConfig(rank=4, scale=1.5, use_rslora=use_rslora, rank_pattern={"0": 9})
    assert (config.scaling_of("0"), config.scaling_of("1")) == (1.5, 1.5)
    assert config.alpha_of("0") == 1.5 * (3 if use_rslora else 9)
