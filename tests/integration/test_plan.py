"""What `plan` says without weights is what a run with them has: numbers, bytes, and memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.runs import result_of
from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.config.schema import ModelConfig
from lora_lightning.lora.target_presets import target_sets
from lora_lightning.models.loading import load_generator
from lora_lightning.models.model_config import load_model_config
from lora_lightning.tasks import build_task
from lora_lightning.training.module import LoraModule
from lora_lightning.training.preflight import free_memory
from lora_lightning.training.preflight.dry_run import dry_run, most_rows, total
from lora_lightning.training.preflight.free_memory import free_bytes
from lora_lightning.training.preflight.memory import saved_bytes
from lora_lightning.training.preflight.plan import methods

CPU = torch.device("cpu")
BASE = ["trainer=cpu", "trainer.precision=32-true", "data.max_tokens=null", "data.batch_size=4"]


def config_of(folder, *overrides):
    return compose_config([*BASE, f"model.name_or_path={folder}", *overrides])


def real_module(config) -> LoraModule:
    """The run's module with weights, as `train` builds it."""
    settings = settings_of(config)
    task = build_task(settings.task)
    task.prepare(load_model_config(settings.model))
    task.assume_labels()
    tokenizer = AutoTokenizer.from_pretrained(settings.model.name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    module = LoraModule(task, settings.model, settings.lora, settings.optim, tokenizer=tokenizer)
    module.configure_model()
    return module


def bare(folder: Path, place: Path) -> Path:
    """A folder that holds the model's config.json and nothing else."""
    place.mkdir()
    shutil.copy(folder / "config.json", place)
    return place


def with_values(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A rehearsal's batch as one of a real model."""
    real = {name: torch.ones(tensor.shape, dtype=tensor.dtype) for name, tensor in batch.items()}
    ids = real["input_ids"]
    if "places" in real:
        real["places"] = torch.arange(len(real["places"]))
    if "position_ids" in real:  # rows of 32 positions, joined
        real["position_ids"] = torch.arange(ids.numel()).view_as(ids) % 32
    return real


SHORT = ["data.max_length=32"]
TEXT = [*SHORT, "task.generation.max_new_tokens=8"]
LM, INSTRUCT = ["task=lm", *TEXT], ["task=instruct", *TEXT]
IN_16_BITS = ["trainer.precision=bf16-true", "model.dtype=bfloat16"]
EXPERTS = "lora.target_parameters=[experts.gate_up_proj,experts.down_proj]"
CASES = {
    "rows joined": ("tiny_llama", LM),
    "experts": ("tiny_mixtral", INSTRUCT),
    "experts adapted": ("tiny_mixtral", [*INSTRUCT, EXPERTS]),
    "DoRA": ("tiny_llama", [*INSTRUCT, "lora=dora"]),
    "encoder, whole": ("tiny_bert", [*SHORT, "lora=full"]),
    "encoder in 16 bits, its head in 32": ("tiny_bert", [*SHORT, *IN_16_BITS]),
    "encoder-decoder, LoRA-FA": ("tiny_t5", ["task=summarization", *TEXT, "lora=lora_fa"]),
}


@pytest.mark.parametrize("case", CASES)
def test_dry_run_memory_equals_the_real_model(request, tmp_path, case):
    """Against the tensors of the loaded model and what autograd saves of a pass through it."""
    model, settings = CASES[case]
    folder = request.getfixturevalue(model)
    module = real_module(config_of(folder, *settings))
    with dry_run(config_of(bare(folder, tmp_path / "bare"), *settings), CPU) as run:
        weights = run.tracker.now["weights"]
        kept = {}
        for rows in (2, 6):
            loss = run.forward(rows)
            kept[rows] = run.tracker.now["activations"]
            del loss
        batches = {rows: run.batch(rows) for rows in kept}
    # Between two sizes, so that what does not depend on the rows is left out.
    saved = {rows: saved_bytes(module, with_values(batch)) for rows, batch in batches.items()}
    assert kept[6] - kept[2] == pytest.approx(saved[6] - saved[2], rel=0.02)
    tensors = [*module.model.parameters(), *module.model.buffers()]
    tensors += module.adapter.base_tensors.initial.values() if module.adapter else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert weights == pytest.approx(sum(storages.values()), rel=0.02)


def test_dry_run_nf4_bytes_equal_bitsandbytes(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(str(tiny_llama), quantization="nf4", dtype="float32")
    model = load_generator(config, AutoTokenizer.from_pretrained(tiny_llama))
    real = sum(p.untyped_storage().nbytes() for p in model.parameters())
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            parts = [state.absmax, state.code, state.offset]
            parts += [state.state2.absmax, state.state2.code]
            real += sum(part.untyped_storage().nbytes() for part in parts)
    with dry_run(config_of(tiny_llama, *LM, "model.quantization=nf4"), CPU) as run:
        adapter = sum(parameter.numel() * 4 for parameter in run.trained)
        assert run.tracker.now["weights"] - adapter == pytest.approx(real, rel=0.01)


def test_dry_run_with_checkpointing_keeps_less_and_recomputes_a_layer(tiny_llama):
    parts = {}
    for on in ("false", "true"):
        settings = [*INSTRUCT, f"model.gradient_checkpointing={on}"]
        with dry_run(config_of(tiny_llama, *settings), CPU) as run:
            loss = run.forward(16)
            kept = run.tracker.now["activations"]
            del loss
            parts[on] = kept, total(run.step(16))
    assert parts["true"][0] < 0.5 * parts["false"][0]
    assert parts["true"][0] < parts["true"][1] < parts["false"][1]


@pytest.mark.parametrize("lora", ["default", "pissa"])
def test_plan_adapter_size_equals_the_file_of_a_run(
    run_cli, tiny_bert, rows_jsonl, fast, lora, tmp_path
):
    """plan's table from config.json against what train has counted and written."""
    where = [f"data.train={rows_jsonl}", f"output_dir={tmp_path / 'run'}"]
    common = [*fast, f"lora={lora}", "lora.rank=3", "trainer.max_steps=1"]
    targets = "lora.targets=[query,value]"
    status, _, err = run_cli(
        "train",
        *common,
        *where,
        targets,
        f"model.name_or_path={tiny_bert}",
        "callbacks.samples=null",
    )
    assert status == 0, err
    result = result_of(tmp_path / "run")
    written = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    place = bare(tiny_bert, tmp_path / "bare")
    status, out, err = run_cli("plan", *common, f"model.name_or_path={place}")
    assert status == 0, err
    row = re.search(r"query and value +3 +([\d,]+) +[\d.]+ % +([\d,]+)", out)
    assert int(row[1].replace(",", "")) == result["trainable_parameters"]
    assert int(row[2].replace(",", "")) == written


def test_plan_with_patterns_counts_matched_modules(run_cli, tiny_llama, tmp_path):
    """down_proj has a rank of its own, which the narrower sets do not have; o_proj has, in one."""
    place = bare(tiny_llama, tmp_path / "bare")
    pattern = "+lora.rank_pattern={down_proj: 5, o_proj: 2}"
    status, out, err = run_cli("plan", *BASE, f"model.name_or_path={place}", "task=lm", pattern)
    assert status == 0, err
    rows = dict(
        re.findall(r"^(query and value|attention|all linear layers) +4 +([\d,]+)", out, re.M)
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    sets = {
        "query and value": ["q_proj", "v_proj"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "all linear layers": [*"qkvo", "gate", "up", "down"],
    }
    for name, ends in sets.items():
        expected = 0
        for module, layer in model.named_modules():
            end = next((e for e in ends if module.endswith(e if "_" in e else f"{e}_proj")), None)
            if end is not None and module.endswith("_proj"):
                own = {"down_proj": 5, "o_proj": 2}.get(module.rpartition(".")[2], 4)
                expected += own * sum(layer.weight.shape)
        assert int(rows[name].replace(",", "")) == expected
    status, _, err = run_cli(
        "plan", *BASE, f"model.name_or_path={place}", "+lora.rank_pattern={x: 5}"
    )
    assert status == 2
    assert "rank_pattern" in err


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_dry_run_optimizer_states_equal_a_real_step(tiny_bert, name):
    settings = [*SHORT, f"optim.name={name}"]
    module = real_module(config_of(tiny_bert, *settings))
    optimizer = module.build_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    real = sum(v.untyped_storage().nbytes() for v in states if torch.is_tensor(v))
    with dry_run(config_of(tiny_bert, *settings), CPU) as run:
        assert run.step(2)["optimizer"] == real


def test_dry_run_micro_batches_bound_the_activations(tiny_llama):
    settings = [*INSTRUCT, "data.max_tokens=64"]
    with dry_run(config_of(tiny_llama, *settings), CPU) as run:
        assert run.at_a_time == 2
        two, many = run.step(2), run.step(64)
        assert many == run.step(1000)
        assert many["activations"] == two["activations"]
        trained = sum(4 * parameter.numel() for parameter in run.trained)
        assert many["gradients"] - two["gradients"] == pytest.approx(trained, rel=0.5)


@pytest.mark.parametrize("limit", [5e6, 1e8])
def test_most_rows_fit_and_one_more_does_not(tiny_bert, limit):
    with dry_run(config_of(tiny_bert, *SHORT), CPU) as run:
        sizes = {}

        def need(rows: int) -> int:
            sizes[rows] = total(run.step(rows))
            return sizes[rows]

        found = most_rows(need, int(limit), 4)
        assert len(sizes) <= 6
        assert need(found) <= limit < need(found + 1)


@pytest.mark.parametrize(("level", "slope", "start"), [(0, 7, 3), (500, 7, 40), (10, 5, 1)])
def test_most_rows_equals_trying_all(level, slope, start):
    def need(rows: int) -> int:
        return int(max(level, 100 + slope * rows))

    for limit in (90, 107, 350, 499, 500, 501, 1000):
        fitting = [rows for rows in range(1, 2000) if need(rows) <= limit]
        assert most_rows(need, limit, start) == max(fitting, default=0)


def test_methods_of_full_fine_tuning_take_fp32_weights(tiny_llama):
    """Full fine-tuning keeps its weights in fp32 where LoRA is asked for in bf16-true."""
    config = config_of(tiny_llama, "task=lm", "trainer.precision=bf16-true")
    each = {name: (c.trainer.precision, c.model.dtype) for name, c in methods(config).items()}
    assert each == {
        "LoRA": ("bf16-true", "bfloat16"),
        "QLoRA": ("bf16-true", "bfloat16"),
        "full": ("bf16-mixed", "float32"),
    }


def test_target_sets_of_each_architecture_are_its_own_names(tiny_bert, tiny_llama, tiny_t5):
    found = {}
    for folder, task in ((tiny_bert, "sentiment"), (tiny_llama, "lm"), (tiny_t5, "summarization")):
        module = real_module(config_of(folder, f"task={task}", "lora=full"))
        found[task] = target_sets(module.model)
    narrow, wide = "query and value", "attention"
    assert found["sentiment"][narrow] == ["query", "value"]
    assert found["sentiment"][wide] == ["query", "key", "value", "attention.output.dense"]
    assert found["lm"][narrow] == ["q_proj", "v_proj"]
    assert found["lm"][wide] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert found["summarization"][narrow] == ["q", "v"]
    assert all(sets["all linear layers"] == "all-linear" for sets in found.values())


@pytest.mark.parametrize(("optimizer", "status"), [("AdamW", 0), ("ASGD", 2)])
def test_plan_in_a_process_ends_with_its_own_status(optimizer, status, tiny_llama, tmp_path):
    """Copies of fake tensors, as metrics make them, damage memory and end a process."""
    command = [sys.executable, "-m", "lora_lightning", "plan", *BASE, "task=lm"]
    settings = [f"model.name_or_path={tiny_llama}", f"optim.name={optimizer}"]
    done = subprocess.run(
        [*command, *settings], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr


def test_plan_report_adds_up_for_each_method(run_cli, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nobody has trained before
    place = bare(tiny_llama, tmp_path / "bare")
    where = [f"model.name_or_path={place}", "task=instruct", "task.generation.max_new_tokens=8"]
    status, out, err = run_cli("plan", *BASE, *where, "device_gib=0.001")
    assert status == 0, err
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "32-true" in line}
    assert set(rows) == {"LoRA", "QLoRA", "full"}
    for cells in rows.values():
        *parts, whole = (float(cell.replace(",", "")) for cell in cells[2:8])
        assert whole == pytest.approx(sum(parts), abs=0.3)
        assert cells[8] == ("yes" if whole <= 0.9 * 0.001 * 1024 else "no")
    assert "within nine tenths of 0.0 GiB (device_gib)" in out
    assert not list(Path.cwd().glob("outputs"))


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/job/step", {"job/memory.max": "900", "job/memory.current": "300"}),
        (
            "0::/job/step",
            {"job/step/memory.max": "max", "memory.max": "900", "memory.current": "300"},
        ),
        (
            "7:cpu:/x\n5:memory,hugetlb:/job",
            {"memory/job/memory.limit_in_bytes": "900", "memory/job/memory.usage_in_bytes": "300"},
        ),
        ("0::/of/the/host", {"memory.max": "900", "memory.current": "300"}),  # a container
    ],
    ids=["above its own", "the root's", "version 1", "container"],
)
def test_free_bytes_respect_control_groups(line, files, tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "MEMBERSHIP", tmp_path / "own")
    monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "groups")
    (tmp_path / "own").write_text(f"{line}\n")
    free = free_bytes(CPU)
    assert free > 2**20
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "memory.stat").write_text("anon 250\ninactive_file 50\n")
    assert free_bytes(CPU) == 650
