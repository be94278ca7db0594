"""Each run of a pack against the same run alone, in another Trainer, from the same config."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from helpers.data import write_jsonl
from helpers.runs import logged, result_of
from lora_lightning.config.compose import compose_config
from lora_lightning.lora import UserError
from lora_lightning.sweeps.packed.__main__ import main
from lora_lightning.sweeps.packed.capacity import SLOT_BYTES, slots_at_a_time
from lora_lightning.sweeps.packed.pack import Pack
from lora_lightning.sweeps.packed_launcher import PackedLauncher
from lora_lightning.sweeps.queue import Job
from lora_lightning.training.run import train
from lora_lightning.utils.memory import peak_memory_mib

ADAPTER = "adapter/adapter_model.safetensors"


def make_run(folder: Path, overrides: list[str]) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    config = compose_config(overrides)
    (folder / ".hydra/config.yaml").write_text(OmegaConf.to_yaml(config))
    return folder


def alone(folder: Path, overrides: list[str]) -> Path:
    """The run by itself, through the ordinary path."""
    make_run(folder, overrides)
    config = compose_config([*overrides, f"output_dir={folder}"])
    train(config, resume=True)
    return folder


def assert_runs_equal(packed: Path, solo: Path) -> None:
    """Weights, every logged loss, final metrics, the best step and the optimizer's state."""
    ours, truth = load_file(packed / ADAPTER), load_file(solo / ADAPTER)
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        error = (ours[name] - tensor).norm() / tensor.norm().clamp_min(1e-30)
        assert error <= 1e-5, f"{name}: {error}"
    for name in ("train/loss", "val/loss", "lr-AdamW/pg1"):
        assert logged(packed, name) == pytest.approx(logged(solo, name), rel=1e-5)
    mine, other = result_of(packed), result_of(solo)
    metrics = [name for name in other if name.startswith(("val/", "test/"))]
    assert [mine[name] for name in metrics] == pytest.approx(
        [other[name] for name in metrics], rel=1e-5, nan_ok=True
    )
    for name in ("steps", "epochs", "trainable_parameters", "tokens", "config_hash", "before"):
        assert mine[name] == other[name]
    kept = [sorted(path.name for path in run.rglob("*.ckpt")) for run in (packed, solo)]
    assert kept[0] == kept[1]
    last = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
        for run in (packed, solo)
    ]
    for one, two in zip(*(state[0]["state"].values() for state in last), strict=True):
        torch.testing.assert_close(one["exp_avg_sq"], two["exp_avg_sq"], rtol=1e-4, atol=1e-12)


@pytest.fixture
def common(fast, tiny_bert, rows_jsonl) -> list[str]:
    """Classification, 4 epochs of 8 steps, with the model's own dropout."""
    where = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"]
    return [*fast, *where, "trainer.max_epochs=4", "trainer.log_every_n_steps=1", "optim.lr=1e-2"]


def run_pack(root: Path, common: list[str], slots: list[list[str]]) -> Pack:
    folders = [make_run(root / f"packed{i}", [*common, *own]) for i, own in enumerate(slots)]
    pack = Pack(folders)
    pack.run()
    return pack


def test_classification(common, tmp_path):
    """Ranks 1 to 32, alphas, rates, schedules, targets, dropout, heads: 32 steps each."""
    slots = [
        ["lora.rank=1"],
        ["lora.rank=32", "lora.alpha=4", "optim.lr=1e-3", "optim.scheduler=cosine"],
        ["lora.rank=7", "lora.dropout=0.2", "optim.weight_decay=0.1"],
        ["lora.rank=4", "lora.targets=[query,value]", "lora.bias=lora_only"],
        ["lora.rank=2", "lora.use_rslora=true", "lora.init=gaussian", "lora.layers=[1]"],
    ]
    pack = run_pack(tmp_path, common, slots)
    assert [slot.error for slot in pack.slots] == [None] * len(slots)
    for number, own in enumerate(slots):
        solo = alone(tmp_path / f"alone{number}", [*common, *own])
        assert result_of(solo)["steps"] == 32
        assert_runs_equal(tmp_path / f"packed{number}", solo)
    first, *others = [slot.module.model for slot in pack.slots]
    weight = first.bert.encoder.layer[0].attention.self.query.base_layer.weight
    for model in others:  # one base in memory
        query = model.bert.encoder.layer[0].attention.self.query
        assert getattr(query, "base_layer", query).weight is weight


@pytest.mark.slow
def test_the_family(common, tmp_path):
    """DoRA, PiSSA, OLoRA, LoRA-FA and LoRA+ on one base, which none of them changes."""
    common = [*common, "trainer.max_epochs=2", "optim.lr=1e-3"]
    slots = [
        ["lora.use_dora=true", "lora.dropout=0.1"],
        ["lora.init=pissa", "lora.rank=4"],
        ["lora.init=olora", "lora.rank=2", "lora.use_dora=true", "optim.lr=1e-4"],
        ["lora.freeze_A=true", "lora.dropout=0.1"],
        ["lora.freeze_A=true", "lora.rank=3"],
        ["optim.loraplus_lr_ratio=16"],
    ]
    pack = run_pack(tmp_path, common, slots)
    assert [slot.error for slot in pack.slots] == [None] * len(slots)
    for number, own in enumerate(slots):
        solo = alone(tmp_path / f"alone{number}", [*common, *own])
        assert_runs_equal(tmp_path / f"packed{number}", solo)


def test_what_is_not_trained_yet_is_computed_once(common, tmp_path, monkeypatch):
    """The test before training: one pass for all whose backbone is the base, none for others."""
    common = [*common, "test_before=true", "data.eval_batch_size=4", "trainer.max_epochs=1"]
    start = alone(tmp_path / "start", [*common, "lora.rank=4"])
    slots = [
        ["lora.rank=4"],
        ["lora.rank=8", "seed=3"],
        ["lora.rank=2", "lora.bias=lora_only", "lora.targets=[query,value]"],
        ["lora.rank=4", f"adapter={start / 'adapter'}"],
    ]
    passes: list[list[int]] = []
    forward = Pack._forward

    def counted(pack: Pack, served: list) -> None:
        if served[0].request.order == (0, 0):
            passes.append([slot.number for slot in served])
        forward(pack, served)

    monkeypatch.setattr(Pack, "_forward", counted)
    pack = run_pack(tmp_path, common, slots)
    assert [slot.error for slot in pack.slots] == [None] * len(slots)
    batches = sum(3 in served for served in passes)
    assert batches >= 2
    assert passes.count([0]) == batches
    assert len(passes) == 2 * batches
    for number, own in enumerate(slots):
        solo = alone(tmp_path / f"alone{number}", [*common, *own])
        before = result_of(tmp_path / f"packed{number}")["before"]
        assert before == result_of(solo)["before"]
        assert before.keys() == {"test/loss", "test/accuracy", "test/f1", "test/auroc"}
        assert_runs_equal(tmp_path / f"packed{number}", solo)


def test_causal_model_with_accumulation_and_another_seed(fast, tiny_llama, tmp_path):
    rows = [
        {"document": "good film " * (1 + i % 7), "summary": "good " * (1 + i % 3)}
        for i in range(100)
    ]
    data = tmp_path / "pairs.jsonl"
    write_jsonl(data, rows)
    common = [
        *fast,
        *("task=summarization", "task.generation.max_new_tokens=6", "task.generate_rows=4"),
        *(f"model.name_or_path={tiny_llama}", f"data.train={data}", "data.batch_size=4"),
        *("trainer.accumulate_grad_batches=2", "trainer.max_epochs=3", "optim.lr=3e-3"),
        *("trainer.log_every_n_steps=1", "callbacks.samples.count=2"),
    ]
    slots = [["lora.rank=16"], ["lora.rank=3", "lora.scale=1"], ["lora.rank=4", "seed=3"]]
    pack = run_pack(tmp_path, common, slots)
    assert [slot.error for slot in pack.slots] == [None] * 3
    for number, own in enumerate(slots):
        solo = alone(tmp_path / f"alone{number}", [*common, *own])
        assert result_of(solo)["steps"] >= 30
        assert_runs_equal(tmp_path / f"packed{number}", solo)


def test_one_that_stops_early_and_one_that_fails_leave_the_others_alone(common, tmp_path):
    slots = [
        ["lora.rank=2"],
        # never better than at first: stops after the second validation
        ["lora.rank=4", "optim.lr=1e-12", "callbacks.early_stopping.patience=1"],
        ["lora.rank=8", "optim.lr=1e30"],
    ]
    pack = run_pack(tmp_path, common, slots)
    assert [type(slot.error) for slot in pack.slots] == [type(None), type(None), UserError]
    assert "the training loss is nan" in (tmp_path / "packed2/log.txt").read_text()
    assert result_of(tmp_path / "packed2")["status"] == "failed"
    for number in (0, 1):
        solo = alone(tmp_path / f"alone{number}", [*common, *slots[number]])
        assert_runs_equal(tmp_path / f"packed{number}", solo)
    assert result_of(tmp_path / "packed1")["steps"] < result_of(tmp_path / "packed0")["steps"]


def test_a_model_without_a_backbone_is_refused(fast, tiny_t5, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"document": "good film", "summary": "good"}) + "\n")
    files = [f"data.{split}={data}" for split in ("train", "val", "test")]
    common = [*fast, *files, "task=summarization", f"model.name_or_path={tiny_t5}"]
    pack = run_pack(tmp_path, common, [["lora.rank=2"], ["lora.rank=3"]])
    assert all("hydra/launcher=process" in str(slot.error) for slot in pack.slots)


def test_memory_decides_how_many_train_at_a_time(common, tmp_path, capsys):
    own = [["lora.rank=2"], ["lora.rank=16"], ["lora.rank=4"]]
    folders = [make_run(tmp_path / f"packed{i}", [*common, *more]) for i, more in enumerate(own)]
    assert slots_at_a_time(folders, None) == 3
    assert slots_at_a_time(folders, 64.0) == 3
    there = peak_memory_mib(torch.device("cpu"))  # a run of this size is mostly its SLOT_BYTES
    room = [SLOT_BYTES / 2**20 * slots for slots in (-2, 1.6, 2.6, 8)]
    found = [slots_at_a_time(folders, (there + more) / 1024) for more in room]
    assert found == [1, 1, 2, 3]
    assert capsys.readouterr().out.count("WARNING") == 1
    assert main(folders, 0.01) == 0
    out = capsys.readouterr().out
    assert "1 of 3 runs at a time" in out
    assert "WARNING one alone needs about" in out
    for number, more in enumerate(own):
        assert_runs_equal(
            tmp_path / f"packed{number}", alone(tmp_path / f"alone{number}", common + more)
        )


def test_a_mistake_met_by_the_estimate_is_told_by_each_run(common, tmp_path):
    wrong = [*common, "task.label_column=nowhere"]
    folders = [make_run(tmp_path / str(i), [*wrong, f"lora.rank={i + 1}"]) for i in range(2)]
    assert main(folders, 1.0) == 2
    for folder in folders:
        assert result_of(folder)["error"].startswith("UserError: ")
        assert "nowhere" in result_of(folder)["error"]


@pytest.mark.parametrize("memory", [0, -1, "much", True])
def test_a_wrong_budget_is_told(memory):
    with pytest.raises(UserError, match=r"launcher\.memory must be a number of GiB above"):
        PackedLauncher(memory=memory)


def test_a_budget_reaches_the_process(tmp_path):
    planned = [
        (Job(number, own, tmp_path / str(number)), compose_config(["model.name_or_path=m", *own]))
        for number, own in enumerate((["lora.rank=2"], ["lora.rank=4"]))
    ]
    (work,) = PackedLauncher(memory=2.5).divide(planned)
    assert work.command[2:5] == ["lora_lightning.sweeps.packed", "--memory", "2.5"]
    (work,) = PackedLauncher().divide(planned)
    assert work.command[3:] == [str(job.folder) for job, _ in planned]


def test_who_shares_a_pack():
    base = ["model.name_or_path=m", "data.train=d"]
    variants = [
        ["lora.rank=2"],
        ["lora.rank=4", "optim.lr=1e-4", "trainer.gradient_clip_val=0.5"],
        ["lora.rank=2", "seed=1"],
        ["lora=full"],
        ["lora.rank=2", "model.gradient_checkpointing=true"],
        ["lora.rank=8"],
        ["lora.rank=8", "data.batch_size=4"],
        ["lora.rank=16"],
        ["trainer=fsdp2"],
    ]
    planned = [
        (Job(number, own, Path(str(number))), compose_config([*base, *own]))
        for number, own in enumerate(variants)
    ]
    work = PackedLauncher(max_slots=3).divide(planned)
    assert [[job.number for job in item.jobs] for item in work] == [
        [0, 1, 5],
        [7],
        [2],
        [3],
        [4],
        [6],
        [8],
    ]


@pytest.mark.slow
def test_a_killed_packed_sweep_is_finished_by_the_same_command(common, tmp_path):
    """Killed while its runs are at different checkpoints: weights are those of no kill."""
    more = ["trainer.max_epochs=12", "callbacks.last.every_n_steps=4", "hydra/launcher=packed"]
    command = [sys.executable, "-m", "lora_lightning", "train", "-m", *common, *more]
    command.append("lora.rank=2,4,8")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"hydra.sweep.dir={whole}"], check=True, capture_output=True)
    command.append(f"hydra.sweep.dir={killed}")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (killed / "1/checkpoints/last.ckpt").exists():
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    for job in ("0", "1", "2"):
        assert result_of(killed / job)["status"] == "completed"
        ours, truth = (load_file(root / job / ADAPTER) for root in (killed, whole))
        for name, tensor in truth.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7)
