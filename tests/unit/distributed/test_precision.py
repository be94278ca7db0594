"""trainer.precision and model.dtype: what is chosen, what is refused, and what stays fp32."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.runs import result_of
from lora_lightning.adapters.folder import AdapterFolder
from lora_lightning.config.compose import compose_config
from lora_lightning.distributed import hardware_speed, precision
from lora_lightning.distributed.precision import (
    automatic_precision_message,
    resolve_precision,
    with_precision,
)
from lora_lightning.distributed.tf32 import tf32_matmuls
from lora_lightning.lora import UserError
from lora_lightning.models.cpu_kernels import attend


@pytest.mark.parametrize(
    ("asked", "dtype", "full", "fast", "expected"),
    [
        ("auto", "auto", False, True, ("bf16-true", "bfloat16")),
        ("auto", "auto", False, False, ("32-true", "float32")),
        ("auto", "auto", True, True, ("bf16-mixed", "float32")),
        ("auto", "auto", True, False, ("32-true", "float32")),
        ("auto", "float32", False, True, ("32-true", "float32")),
        ("auto", "bfloat16", False, False, ("bf16-true", "bfloat16")),
        ("32-true", "auto", False, True, ("32-true", "float32")),
        (32, "auto", False, True, ("32-true", "float32")),
        ("32-true", "bfloat16", False, True, ("32-true", "bfloat16")),
        ("bf16-true", "auto", False, False, ("bf16-true", "bfloat16")),
        ("bf16-mixed", "auto", False, False, ("bf16-mixed", "auto")),
        ("bf16-mixed", "auto", True, False, ("bf16-mixed", "float32")),
    ],
)
def test_resolve_precision_returns_the_name_and_dtype(
    monkeypatch, asked, dtype, full, fast, expected
):
    monkeypatch.setattr(precision, "fp16_is_fast", lambda accelerator: False)
    monkeypatch.setattr(precision, "bf16_is_fast", lambda accelerator: fast)
    found = resolve_precision(asked, dtype, full=full)
    assert (found.name, found.dtype) == expected


@pytest.mark.parametrize(
    ("asked", "dtype", "full", "message"),
    [
        ("16-true", "auto", False, "must stay fp32"),
        ("bf17", "auto", False, "precision not found"),
        ("bf16-true", "float32", False, "is not supported with trainer.precision=bf16-true"),
        ("bf16-true", "float16", False, "model.dtype=float16: is not supported"),
        ("auto", "float16", False, "model.dtype=float16: requires a GPU"),
        ("tf32", "auto", False, "trainer.precision=tf32: requires a GPU"),
        ("auto", "bfloat16", True, "round away"),
        ("bf16-true", "auto", True, "round away"),
    ],
)
def test_resolve_precision_with_wrong_types_raises(asked, dtype, full, message):
    with pytest.raises(UserError, match=message):
        resolve_precision(asked, dtype, full=full, accelerator="cpu")


@pytest.mark.parametrize(
    ("asked", "dtype", "full", "sharded", "expected"),
    [
        ("auto", "auto", False, False, ("16-mixed", "float16")),
        ("auto", "auto", True, False, ("16-mixed", "float32")),
        ("auto", "auto", False, True, ("32-true", "float32")),
        ("auto", "float32", False, False, ("32-true", "float32")),
        ("tf32", "auto", False, True, ("tf32", "float32")),
        ("tf32", "auto", True, False, ("tf32", "float32")),
    ],
)
def test_resolve_precision_on_a_gpu_without_bf16_takes_fp16(
    monkeypatch, asked, dtype, full, sharded, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "bf16_is_fast", lambda accelerator: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = resolve_precision(asked, dtype, full=full, sharded=sharded)
    assert (found.name, found.dtype) == expected


def test_with_precision_16_mixed_under_sharding_raises(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("fsdp2", "tp", "deepspeed"):
        config = compose_config([f"trainer={name}", "trainer.precision=16-mixed"])
        with pytest.raises(UserError, match=r"trainer\.precision=16-mixed: skips steps"):
            with_precision(config)


def test_with_precision_fp16_adapter_on_a_cpu_is_fp32():
    config = compose_config(["trainer=cpu", "model.dtype=float16"])
    found = with_precision(config, trains=False)
    assert (found.trainer.precision, found.model.dtype) == ("32-true", "float32")


@pytest.mark.parametrize(
    ("name", "within"), [("32-true", "highest"), ("tf32", "high"), ("bf16-true", "high")]
)
def test_tf32_matmuls_sets_tf32_unless_the_precision_is_32_true(monkeypatch, name, within):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch.get_float32_matmul_precision() == "highest"
    with tf32_matmuls(name, "cpu"):
        assert torch.get_float32_matmul_precision() == "highest"
    with tf32_matmuls(name, "gpu"):
        assert torch.get_float32_matmul_precision() == within
    assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_matmuls_stays_on_until_the_last_thread_leaves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []

    def block(entered, may_leave):
        with tf32_matmuls("bf16-true", "gpu"):
            entered.set()
            assert may_leave.wait(60)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # what a user may have chosen
    threads = []
    try:
        for _ in range(2):
            entered, may_leave = threading.Event(), threading.Event()
            thread = threading.Thread(target=block, args=[entered, may_leave], daemon=True)
            thread.start()
            assert entered.wait(60)
            threads.append((thread, may_leave))
        for thread, may_leave in threads:
            found.append(torch.get_float32_matmul_precision())
            may_leave.set()
            thread.join(60)
        found.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["high", "high", "medium"]


@pytest.fixture(scope="module")
def runs(trained_run, tiny_llama):
    """The same three steps in each precision."""
    common = [
        "trainer.max_steps=3",
        "trainer.log_every_n_steps=1",
        f"model.name_or_path={tiny_llama}",
    ]
    names = ("32-true", "bf16-true", "bf16-mixed")
    return {name: trained_run(*common, f"trainer.precision={name}") for name in names}


def test_train_in_each_precision_gives_nearly_the_same_fp32_adapter(runs):
    results = {name: result_of(run) for name, run in runs.items()}
    adapters = {
        name: load_file(run / "adapter" / "adapter_model.safetensors") for name, run in runs.items()
    }
    for name, result in results.items():
        assert result["precision"] == name
        assert result["test/loss"] == pytest.approx(results["32-true"]["test/loss"], abs=0.02)
        assert {tensor.dtype for tensor in adapters[name].values()} == {torch.float32}
    # In 16 bits the steps are others, if by little: it is no longer fp32 that is computed in.
    name = next(key for key in adapters["32-true"] if "lora_B" in key)
    for other in ("bf16-true", "bf16-mixed"):
        assert not torch.equal(adapters[other][name], adapters["32-true"][name])


def test_saved_settings_hold_the_dtype_of_the_base(runs):
    types = {
        name: AdapterFolder(runs[name] / "adapter").read_sidecar()["settings"]["model"]["dtype"]
        for name in ("32-true", "bf16-true")
    }
    assert types == {"32-true": "float32", "bf16-true": "bfloat16"}


def test_load_trained_of_bf16_true_has_a_bf16_base(runs):
    from lora_lightning.inference.loading import load_trained

    module = load_trained(runs["bf16-true"] / "adapter")
    for name, parameter in module.model.named_parameters():
        trained = "lora_" in name or name == "score.weight"
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16), name


def test_with_precision_of_a_resumed_run_keeps_its_precision(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda accelerator: False)
    config = compose_config([])
    assert with_precision(config).trainer.precision == "32-true"
    assert with_precision(config, "bf16-true").trainer.precision == "bf16-true"
    assert config.trainer.precision == "auto"


@pytest.mark.parametrize(
    ("fast", "overrides", "said"),
    [
        (True, [], True),
        (True, ["lora=full"], True),
        (False, [], False),
        (True, ["model.dtype=bfloat16"], False),
        (True, ["trainer.precision=bf16-true"], False),
    ],
)
def test_automatic_precision_message_names_the_alternative(monkeypatch, fast, overrides, said):
    monkeypatch.setattr(precision, "bf16_is_fast", lambda accelerator: fast)
    config = compose_config(overrides)
    told = automatic_precision_message(config, with_precision(config))
    assert ("trainer.precision=32-true" in str(told)) == said


def test_trainer_that_casts_the_adapter_raises(tiny_bert):
    import lightning as L
    from torch.utils.data import DataLoader

    from helpers.modules import batches_of, encoded_rows, make_module

    module = make_module(tiny_bert)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_epochs=1,
    )
    batches = DataLoader(batches_of(encoded_rows(4), [4]), batch_size=None)
    with pytest.raises(UserError, match="must be fp32"):
        trainer.fit(module, batches)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_in_bf16_on_a_cpu_computes_in_fp32(autocast, masked):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, not masked
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 33, 16).bfloat16() for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 33, 33) > 0.3 if masked else None
    weights = torch.randn(2, 33, 4, 16)

    def run(function, dtype, trains=True):
        inputs = [t.to(dtype, copy=True).requires_grad_(trains) for t in (query, key, value)]
        lower = torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64)
        with lower, torch.set_grad_enabled(trains):
            output, _ = function(module, *inputs, mask, scaling=0.25)
        if trains:
            (output * weights.to(dtype)).sum().backward()
        return output.detach(), *(t.grad for t in inputs)

    exact = run(sdpa_attention_forward, torch.float64)
    found = run(attend, torch.bfloat16)
    plain = run(sdpa_attention_forward, torch.bfloat16)
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # No further off than rounding the truth once, or the gradient of each head that shares it.
        assert (ours - truth).abs().max() <= 0.02 * truth.abs().max()
        assert (ours - truth).norm() < (theirs - truth).norm()
    without = run(attend, torch.bfloat16, trains=False)[0]
    assert torch.equal(without, run(sdpa_attention_forward, torch.bfloat16, trains=False)[0])


# What a CPU is faster at --------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A CPU with bf16 in hardware, whose seconds are given; returns how often they were asked."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    asked: list[torch.dtype] = []

    def give(float32: float, bfloat16: float) -> list[torch.dtype]:
        def seconds(dtype):
            asked.append(dtype)
            return {torch.float32: float32, torch.bfloat16: bfloat16}[dtype]

        monkeypatch.setattr(hardware_speed, "_seconds", seconds)
        return asked

    return give


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"), [(0.005, 0.008, "32-true"), (0.005, 0.002, "bf16-true")]
)
def test_with_precision_on_a_cpu_takes_the_faster_dtype(timed, float32, bfloat16, chosen):
    asked = timed(float32, bfloat16)
    config = compose_config(["trainer=cpu"])
    settled = with_precision(config)
    assert settled.trainer.precision == chosen
    told = automatic_precision_message(config, settled)
    assert told.startswith(f"Precision: {chosen}")
    assert f"took {bfloat16 * 1e3:g} ms in bf16 and {float32 * 1e3:g} ms in fp32" in told
    timed(bfloat16, float32)  # another day it may be otherwise, and the choice stays
    assert with_precision(config).trainer.precision == chosen
    assert asked == [torch.float32, torch.bfloat16]
    typed = compose_config(["trainer=cpu", "trainer.precision=32-true"])
    assert automatic_precision_message(typed, with_precision(typed)) is None


def test_bf16_is_fast_with_damaged_times_measures_again(timed):
    asked = timed(0.005, 0.002)
    assert hardware_speed.bf16_is_fast("cpu")
    kept = hardware_speed._cache_file()
    kept.write_text("{")
    timed(0.002, 0.005)
    assert not hardware_speed.bf16_is_fast("cpu")
    assert json.loads(kept.read_text()) == {"float32": 0.002, "bfloat16": 0.005}
    assert len(asked) == 4


def test_with_precision_on_a_cpu_without_bf16_measures_nothing(timed, monkeypatch):
    asked = timed(0.005, 0.002)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    config = compose_config(["trainer=cpu"])
    settled = with_precision(config)
    assert (settled.trainer.precision, automatic_precision_message(config, settled)) == (
        "32-true",
        None,
    )
    assert asked == []


def test_bf16_is_fast_without_a_cache_folder_measures(timed, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    timed(0.005, 0.002)
    assert hardware_speed.bf16_is_fast("cpu")


def test_seconds_are_positive_for_both_dtypes():
    assert hardware_speed._seconds(torch.float32) > 0
    assert hardware_speed._seconds(torch.bfloat16) > 0
