"""LoRA on parameters: experts in one tensor and routers, by definition and against PEFT."""

from __future__ import annotations

import json
from copy import deepcopy

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.architectures import DENSE_TOO, case
from helpers.asserts import assert_close_in_scale
from helpers.models import random_adapter_on, randomise
from lora_lightning.adapters.combine import combine_adapters
from lora_lightning.adapters.export import engine_problems, write_canonical
from lora_lightning.lora import (
    Adapter,
    AdapterSet,
    LoraConfig,
    UserError,
    load_adapter,
    save_adapter,
)
from lora_lightning.lora.moe import MISTAKEN_IN

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = {"mixtral": "mlp.gate.weight", "qwen2-moe": "mlp.gate.weight", "gpt-oss": "router.weight"}
MODELS = list(ROUTER)
VARIANTS = {
    "experts alone": {"targets": [], "target_parameters": BOTH},
    "one of two": {"target_parameters": ["experts.down_proj"]},
    "in one layer": {
        "targets": ["q_proj"],
        "target_parameters": ["layers.1.mlp.experts.down_proj"],
    },
    "patterns": {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.gate_up_proj": 5, "q_proj": 2},
        "alpha_pattern": {"layers.0.mlp.experts.down_proj": 11},
    },
    "rslora": {"target_parameters": BOTH, "use_rslora": True},
}
PREFIX = "base_model.model."


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    """Of what is trained, by PEFT's name."""
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return {
        name.removeprefix(PREFIX).removesuffix(".default.weight"): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


PAIRS = [
    *(("mixtral", variant) for variant in VARIANTS),
    *((name, variant) for name in MODELS[1:] for variant in ("experts alone", "patterns")),
]


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_expert_adapters_round_trip_through_peft(name, variant, tmp_path):
    """Logits and gradients of our file in PEFT, and of what PEFT then writes, here."""
    this = case(name)
    settings = VARIANTS[variant]
    if variant == "experts alone":
        settings = {**settings, "target_parameters": [*BOTH, ROUTER[name]]}
    adapter = random_adapter_on(this.copy(), **settings)
    ours = this.logits(adapter.model)
    assert (ours - this.logits(this.base)).abs().max() > 1e-2
    save_adapter(adapter, tmp_path / "ours")

    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path / "ours", is_trainable=True)
    theirs.eval()
    assert_close_in_scale(this.logits(theirs), ours)
    expected, actual = gradients(theirs, this.inputs), gradients(adapter.model, this.inputs)
    assert actual.keys() == expected.keys()
    for key, grad in actual.items():
        assert grad.any(), key
        assert_close_in_scale(grad, expected[key])
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(this.copy(), tmp_path / "theirs")
    assert_close_in_scale(this.logits(again.model), ours)
    assert_close_in_scale(this.logits(load_adapter(this.copy(), tmp_path / "ours").model), ours)


@pytest.mark.parametrize("targets", ["all-linear", [], ["w1", "w2", "w3"]])
def test_peft_mixtral_targets_load_as_experts(targets, tmp_path):
    """PEFT rewrites old names, and all-linear, to parameters with ranks of their own."""
    this = case("mixtral")
    torch.manual_seed(1)
    named = BOTH if targets == [] else None
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        target_parameters=named,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(this.copy(), config).eval()
    theirs.save_pretrained(tmp_path)
    adapter = load_adapter(this.copy(), tmp_path)
    assert_close_in_scale(this.logits(adapter.model), this.logits(theirs))
    ranks = {row.name.rpartition(".")[2]: row.rank for row in adapter.summary().rows}
    assert ranks["down_proj"] == 3
    assert ranks["gate_up_proj"] == (3 if targets == [] else 6)


@pytest.mark.parametrize("name", MODELS)
def test_expert_file_equals_its_definition_in_float64(name, tmp_path):
    """W_e + s B_e A_e, by hand from the file, is the adapted model and the merged one."""
    this = case(name)
    base = this.copy().double()
    base.set_experts_implementation("eager")  # grouped_mm knows no float64
    adapter = random_adapter_on(deepcopy(base), targets=[], target_parameters=BOTH)
    adapter.model.double()
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = deepcopy(base)
    for layer in expected.model.layers:
        experts = layer.mlp.experts
        number = experts.gate_up_proj.shape[0]
        assert getattr(experts, "is_transposed", False) == (name == "gpt-oss")
        path = f"{PREFIX}model.layers.{layer.self_attn.layer_idx}.mlp.experts"
        for weight, place in (
            (experts.gate_up_proj, f"{path}.base_layer"),
            (experts.down_proj, path),
        ):
            a, b = (tensors[f"{place}.lora_{matrix}.weight"] for matrix in "AB")
            for expert in range(number):
                update = 2.0 * b[:, expert::number] @ a[3 * expert : 3 * expert + 3]
                with torch.no_grad():
                    weight[expert] += update.t() if name == "gpt-oss" else update
    truth = this.logits(expected)
    assert (truth - this.logits(base)).abs().max() > 1e-2
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(this.logits(adapter.model), truth, **exact)
    adapter.merge()
    torch.testing.assert_close(this.logits(adapter.model), truth, **exact)
    adapter.unmerge()
    torch.testing.assert_close(this.logits(adapter.merge_and_unload()), truth, **exact)
    assert set(adapter.model.state_dict()) == set(base.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_expert_adapter_attach_train_merge_remove(name):
    this = case(name)
    model = this.copy()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    base = this.logits(this.base)
    adapter = Adapter(model, LoraConfig(target_parameters=[*BOTH, ROUTER[name]]))
    assert torch.equal(this.logits(model), base)  # B = 0
    randomise(adapter.named_tensors())
    adapted = this.logits(model)
    with adapter.disabled():
        assert torch.equal(this.logits(model), base)
    adapter.set_enabled(False)
    assert torch.equal(this.logits(model), base)
    adapter.set_enabled(True)
    assert torch.equal(this.logits(model), adapted)
    twin = deepcopy(adapter)
    randomise(adapter.named_tensors(), seed=2)
    assert torch.equal(this.logits(twin.model), adapted)
    for layer_name, layer in twin.layers.items():
        size = layer.delta_weight().double().norm()
        assert layer.update_norm().item() == pytest.approx(size.item(), rel=1e-4), layer_name
    adapter.remove()
    assert torch.equal(this.logits(model), base)
    restored = model.state_dict()
    assert list(restored) == list(weights)
    assert all(torch.equal(restored[key], value) for key, value in weights.items())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_expert_adapter_with_each_implementation_is_equal(implementation):
    this = case("mixtral")
    adapter = random_adapter_on(this.copy(), target_parameters=BOTH)
    adapter.model.set_experts_implementation(implementation)
    actual = gradients(adapter.model, this.inputs)
    adapter.model.set_experts_implementation("eager")
    expected = gradients(adapter.model, this.inputs)
    for key, grad in actual.items():
        assert_close_in_scale(grad, expected[key])


def test_expert_adapter_under_checkpointing_is_equal():
    this = case("qwen2-moe")
    adapter = random_adapter_on(this.copy(), target_parameters=BOTH)
    expected = gradients(adapter.model, this.inputs)
    adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter.model.enable_input_require_grads()
    adapter.model.train()
    actual = gradients(adapter.model, this.inputs)
    assert all(torch.equal(actual[key], grad) for key, grad in expected.items())


def test_expert_adapter_in_bfloat16_equals_peft(tmp_path):
    this = case("mixtral")
    base = this.copy().bfloat16()
    adapter = random_adapter_on(deepcopy(base), targets=[], target_parameters=BOTH)
    assert {t.dtype for t in adapter.named_tensors().values()} == {torch.float32}
    save_adapter(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert torch.equal(this.logits(adapter.model), this.logits(theirs))


def test_summary_names_unadapted_experts():
    this = case("mixtral")
    summary = random_adapter_on(this.copy()).summary()
    total = sum(p.numel() for p in this.base.parameters() if p.dim() == 3)
    assert sum(summary.unadapted_experts.values()) == total
    share = 100 * total / summary.total
    told = str(summary).splitlines()[-1]
    assert told.startswith(f"4 expert parameters ({share:.1f} % of all parameters) are not adapted")
    names = "mlp.experts.gate_up_proj,mlp.experts.down_proj"
    assert f"lora.target_parameters=[{names}]" in told
    part = random_adapter_on(this.copy(), target_parameters=BOTH[1:]).summary()
    assert list(part.unadapted_experts) == [f"model.layers.{i}.{BOTH[0]}" for i in (0, 1)]
    whole = random_adapter_on(this.copy(), target_parameters=BOTH).summary()
    assert not whole.unadapted_experts
    assert "not adapted" not in str(whole)
    assert "2 x 32 -> 96" in str(whole)
    assert not random_adapter_on(case("bert").copy()).summary().unadapted_experts


REFUSED = {
    "dropout": ({"target_parameters": BOTH, "dropout": 0.1}, "with lora.dropout=0.1, "),
    "dora": ({"target_parameters": BOTH, "use_dora": True}, "with lora.use_dora=true, "),
    "pissa": ({"target_parameters": BOTH, "init": "pissa"}, "with lora.init=pissa, "),
    "bias": ({"target_parameters": BOTH, "bias": "all"}, "with lora.bias=all, "),
    "typo": ({"target_parameters": ["gate_up_prj"]}, "Did you mean 'gate_up_proj'.*down_proj"),
    "module": ({"target_parameters": ["mlp.experts"]}, "matches no parameter.*gate_up_proj"),
    "vector": (
        {"target_parameters": ["norm.weight"]},
        r"\(32,\), float32: must be an unquantized matrix",
    ),
    "twice": ({"target_parameters": ["q_proj.weight"]}, "already adapted by lora.targets"),
    "whole": (
        {"target_parameters": BOTH, "modules_to_save": ["mlp"]},
        "which is already trained whole",
    ),
    "pattern": (
        {"target_parameters": BOTH, "rank_pattern": {"gate_up_prj": 2}},
        "lora.rank_pattern.*'gate_up_proj'",
    ),
    "nothing": ({"targets": []}, "lora.targets is empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_target_parameters_that_are_invalid_raise(what):
    settings, message = REFUSED[what]
    model = case("mixtral").copy()
    with pytest.raises(UserError, match=message):
        Adapter(model, LoraConfig(**settings))
    assert list(model.state_dict()) == list(case("mixtral").base.state_dict())


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_target_parameters_quantized_raise(kind):
    model = case("mixtral").copy()
    for layer in model.model.layers:
        weight = layer.mlp.experts.down_proj
        layer.mlp.experts.down_proj = nn.Parameter(weight.to(kind), requires_grad=False)
    with pytest.raises(UserError, match=f"{str(kind)[6:]}: must be an unquantized matrix"):
        Adapter(model, LoraConfig(target_parameters=["down_proj"]))


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0@UNKNOWN", "0.19.1", "0.21.2.dev0", None])
def test_expert_files_of_old_peft_raise(version, tmp_path):
    this = case("mixtral")
    save_adapter(random_adapter_on(this.copy(), target_parameters=BOTH), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": version}))
    if version in ("0.18.1", "0.19.0@UNKNOWN"):
        with pytest.raises(UserError, match=f"PEFT {version} have another layout"):
            load_adapter(this.copy(), tmp_path)
    else:
        load_adapter(this.copy(), tmp_path)


def test_expert_files_combined_or_converted_raise(tmp_path):
    save_adapter(random_adapter_on(case("mixtral").copy(), target_parameters=BOTH), tmp_path / "a")
    for use in (
        lambda: combine_adapters([tmp_path / "a"], tmp_path / "b"),
        lambda: write_canonical(tmp_path / "a", tmp_path / "b"),
    ):
        with pytest.raises(UserError, match="adapted experts .*Merge it"):
            use()
    assert not (tmp_path / "b").exists()
    assert "expert parameters" in " ".join(engine_problems(tmp_path / "a", "vllm"))


def test_adapter_set_with_experts_serves_one_at_a_time(tmp_path):
    this = case("mixtral")
    adapter = random_adapter_on(this.copy(), target_parameters=BOTH)
    save_adapter(adapter, tmp_path)
    adapters = AdapterSet(this.copy())
    assert torch.equal(this.logits(adapters.add("one", tmp_path)), this.logits(adapter.model))
    assert torch.equal(this.logits(adapters.base), this.logits(this.base))
    with pytest.raises(UserError, match="cannot share a batch"):
        adapters(["one", None], **this.inputs)


@pytest.mark.parametrize("kind", DENSE_TOO)
def test_layers_named_like_experts_round_trip_through_peft(kind, tmp_path):
    """PEFT reads gate_proj, up_proj and down_proj as experts, wherever they are."""
    base = case(kind).base
    settings = {"dropout": 0.1, "rank_pattern": {"down_proj": 4}}
    adapter = random_adapter_on(deepcopy(base), **settings).model.eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        ours = adapter(ids).logits
        save_adapter(random_adapter_on(deepcopy(base), **settings), tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours")
        assert (ours - base(ids).logits).abs().max() > 1e-2
        assert_close_in_scale(theirs(ids).logits, ours)
        combine_adapters([tmp_path / "ours"], tmp_path / "sum", weights=[1.0])
        write_canonical(tmp_path / "ours", tmp_path / "canonical")
        for folder in ("ours", "sum", "canonical"):
            assert_close_in_scale(
                load_adapter(deepcopy(base), tmp_path / folder).model(ids).logits, ours
            )
            other = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / folder)
            assert_close_in_scale(other(ids).logits, ours)


@pytest.mark.parametrize("kind", DENSE_TOO)
@pytest.mark.parametrize("setting", [{"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}])
def test_settings_on_layers_named_like_experts_raise(kind, setting, tmp_path):
    """In PEFT such a file gave other logits (bias), or none (DoRA)."""
    this = case(kind)
    with pytest.raises(
        UserError, match=r"not supported on down_proj, gate_proj, up_proj of .* PEFT takes"
    ):
        Adapter(this.copy(), LoraConfig(**setting))
    others = {"exclude": ["gate_proj", "up_proj", "down_proj"], **setting}
    adapter = random_adapter_on(this.copy(), **others)
    save_adapter(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(this.copy(), tmp_path)
    assert_close_in_scale(this.logits(theirs), this.logits(adapter.model))


def test_mistaken_models_are_those_of_peft():
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    patterns = conversion._MODEL_TO_CONVERSION_PATTERN
    assert {name for name, kind in patterns.items() if kind == "qwen2_moe"} == MISTAKEN_IN
