"""Several processes, by every strategy, equal one process with all rows of a step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from helpers.data import make_rows, write_jsonl
from helpers.runs import logged, result_of
from lora_lightning.config.compose import compose_config
from lora_lightning.training.run import train

FILES = ("result.json", "samples.jsonl", ".hydra", ".lock")
COMMON = [
    "trainer.precision=32-true",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.5",
    "trainer.log_every_n_steps=1",
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
    "optim.name=SGD",
    "optim.lr=0.2",
    "optim.weight_decay=0",
    "seed=3",
]


SUMMARIES = [
    "task=summarization",
    "task.source_column=text",
    "task.target_column=summary",
    "task.generation.max_new_tokens=6",
    "task.generate_rows=-1",
    "task.text_metrics=[rouge,bleu,chrf]",
    "data.packing=true",
]
LLAMA = "lora.targets=[q_proj,v_proj,o_proj,down_proj,up_proj]"
BERT = "lora.targets=[query,value,attention.output.dense,intermediate.dense,output.dense]"
TASKS = {
    "llama-sentiment": ("tiny_llama", [LLAMA]),
    "llama-summarization": ("tiny_llama", [LLAMA, *SUMMARIES]),
    "bert-sentiment": ("still_bert", [BERT]),
    # Cut by columns and by rows in tensor parallelism.
    "llama-parts": (
        "tiny_llama",
        [
            LLAMA,
            *SUMMARIES,
            "+lora.parts={q_proj: [a, -b], o_proj: [a, b], up_proj: {a: 40, b: 24}}",
        ],
    ),
}
# Micro-batches, too, whose number differs between two ranks: the sum of a step is the same.
PARTS = "data.max_tokens=32"
WAYS = {
    "ddp": (2, ["trainer.strategy=ddp", "data.batch_size=4", PARTS]),
    "fsdp2": (2, ["trainer=fsdp2", "data.batch_size=4"]),
    "tp": (2, ["trainer=tp", "data.batch_size=8", PARTS]),
    "fsdp2-checkpointing": (
        2,
        ["trainer=fsdp2", "data.batch_size=4", "model.gradient_checkpointing=true"],
    ),
    "deepspeed": (2, ["trainer=deepspeed", "data.batch_size=4", PARTS]),
    "fsdp2-tp": (4, ["trainer=tp", "trainer.strategy.tensor_parallel_size=2", "data.batch_size=4"]),
}
DEFAULT = ("llama-summarization", "ddp")
"""What is quick enough for every run of the tests."""
TAKEN = {
    "llama-summarization": list(WAYS),
    "llama-sentiment": ["tp"],
    "bert-sentiment": ["ddp", "fsdp2", "tp"],
    "llama-parts": ["fsdp2", "tp", "fsdp2-tp"],
}
"""Ways that each task goes."""
PAIRS = [
    pytest.param(
        task,
        way,
        marks=() if (task, way) == DEFAULT else pytest.mark.slow,
    )
    for task in TASKS
    for way in TAKEN[task]
]
each_pair = pytest.mark.parametrize(("one", "runs"), PAIRS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def still_bert(tiny_bert, tmp_path_factory):
    """A BERT without dropout, which other batches would draw otherwise, and of large weights."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("still_bert")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    config = BertConfig.from_pretrained(tiny_bert)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.initializer_range = 0.3
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(request, tmp_path_factory):
    """Settings, and the folder of a run of one process with all rows of a step in one batch.

    The training and the validation rows leave a last batch of one row, in which a second process
    has none; the test rows are odd in number.
    """
    model, settings = TASKS[request.param]
    folder = tmp_path_factory.mktemp("equal")
    rows = make_rows(61)
    rows = [{**row, "summary": " ".join(row["text"].split()[-3:])} for row in rows]
    parts = {"train": rows[:41], "val": rows[41:58], "test": rows[58:]}
    for split, part in parts.items():
        write_jsonl(folder / f"{split}.jsonl", part)
    common = [
        *COMMON,
        *settings,
        f"model.name_or_path={request.getfixturevalue(model)}",
        *(f"data.{split}={folder / split}.jsonl" for split in parts),
        f"data.cache_dir={folder / 'cache'}",
    ]
    alone = ["trainer=cpu", "data.batch_size=8", "data.max_tokens=null"]
    train(compose_config([*alone, *common, f"output_dir={folder / 'one'}"]))
    return folder, common


@pytest.fixture(scope="module")
def runs(request, one):
    """Folders of that run and of the same by several processes, and what these said."""
    if request.param == "deepspeed":
        pytest.importorskip("deepspeed")
    folder, common = one
    count, settings = WAYS[request.param]
    settings = [s for s in settings if s.startswith("trainer=")] + [
        "trainer.accelerator=cpu",
        f"trainer.devices={count}",
        *(s for s in settings if not s.startswith("trainer=")),
    ]
    name = request.param
    done = subprocess.run(
        [sys.executable, "-m", "lora_lightning", "train", *settings, *common, f"output_dir={name}"],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "one", folder / name, done, count


@each_pair
def test_losses_and_weights_equal_those_of_one_process(runs):
    one, other, _, _ = runs
    for name in ("train/loss", "val/loss"):
        assert len(logged(one, name)) >= 2
        assert logged(other, name) == pytest.approx(logged(one, name), rel=1e-5)
    norms = logged(one, "update_norm/total")
    assert norms[-1] > 0
    assert logged(other, "update_norm/total") == pytest.approx(norms, rel=1e-4)
    truth, ours = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert set(ours) == set(truth)
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)
    assert max(t.abs().max() for name, t in truth.items() if "lora_B" in name) > 1e-3


@each_pair
def test_metrics_over_uneven_ranks_equal_those_of_one_process(runs):
    one, two = result_of(runs[0]), result_of(runs[1])
    assert two["world_size"] == runs[3]
    for name, value in one.items():
        if name.startswith(("val/", "test/")):
            assert two[name] == pytest.approx(value, abs=1e-5, rel=1e-6), name
    assert two["before"] == pytest.approx(one["before"], abs=1e-5, rel=1e-6)
    for name in ("steps", "epochs", "trainable_parameters", "total_parameters"):
        assert two[name] == one[name]
    # A process stands in for the absent row of each epoch's last batch with another.
    assert one["tokens"] <= two["tokens"] <= one["tokens"] + 2 * 30


@each_pair
def test_checkpoints_hold_what_is_trained_and_nothing_else(runs):
    """The same names and shapes whoever wrote them, and as many numbers as are trained."""
    for pattern in ("last.ckpt", "best-*.ckpt"):
        shapes = []
        for run in runs[:2]:
            (path,) = (run / "checkpoints").glob(pattern)
            kept = torch.load(path, weights_only=True)["state_dict"]
            assert sum(t.numel() for t in kept.values()) == result_of(run)["trainable_parameters"]
            assert all(tensor.isfinite().all() for tensor in kept.values())
            shapes.append({name: tensor.shape for name, tensor in kept.items()})
        assert shapes[0] == shapes[1]


@each_pair
def test_one_folder_that_rank_zero_wrote(runs):
    one, other, done, _ = runs
    inside = {path.name for path in other.iterdir()}
    assert inside == {"adapter", "checkpoints", "csv", "tensorboard", *FILES}
    assert (other / ".hydra" / "config.yaml").is_file()
    assert done.stdout.count("On the 3 test rows") == 1
    kept = [
        json.loads((run / "adapter" / "lora_lightning.json").read_text()) for run in (one, other)
    ]
    assert kept[0]["base_fingerprint"] == kept[1]["base_fingerprint"] != ""


@each_pair
def test_nothing_is_said_that_no_user_can_act_on(runs):
    said = runs[2].stdout + runs[2].stderr
    for noise in ("sync_dist", "weights_only", "Traceback", "Warning"):
        assert noise not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "way"),
    [
        *(("llama-summarization", way) for way in ("fsdp2", "tp", "deepspeed")),
        ("bert-sentiment", "tp"),
    ],
    indirect=["one"],
)
def test_an_fp32_adapter_on_a_bf16_base_in_shares(way, one):
    """What is trained is fp32, and close to that of one process on the same bf16 base."""
    if way == "deepspeed":
        pytest.importorskip("deepspeed")
    folder, common = one
    count, (trainer, *others) = WAYS[way]
    precision = ["trainer.precision=bf16-true"]
    shared = [trainer, "trainer.accelerator=cpu", f"trainer.devices={count}", *others]
    alone = ["trainer=cpu", "data.batch_size=8", "data.max_tokens=null"]
    losses = []
    for name, settings in (("bf16-alone", alone), (f"bf16-{way}", shared)):
        run = folder / name
        if not run.exists():
            command = [sys.executable, "-m", "lora_lightning", "train", *settings, *common]
            done = subprocess.run(
                [*command, *precision, f"output_dir={run}"],
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        losses.append(logged(run, "train/loss"))
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] != logged(folder / "one", "train/loss")
