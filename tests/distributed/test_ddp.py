"""Two processes under DDP equal one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_rows
from safetensors.torch import load_file

from lora_lightning.config import compose_config
from lora_lightning.train import train

COMMON = [
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.5",
    "trainer.log_every_n_steps=1",
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
    "lora.targets=[q_proj,v_proj,down_proj]",
    "optim.name=SGD",
    "optim.lr=0.2",
    "optim.weight_decay=0",
    "seed=3",
]


TASKS = {
    "sentiment": [],
    "summarization": [
        "task=summarization",
        "task.source_column=text",
        "task.target_column=summary",
        "task.max_new_tokens=6",
        "task.generate_rows=-1",
        "task.text_metrics=[rouge,bleu,chrf]",
        "data.packing=true",
    ],
}


@pytest.fixture(scope="module", params=TASKS)
def runs(request, tiny_llama, tmp_path_factory):
    """Folders of a run of two processes, and of one process with a batch twice as large.

    The training and the validation rows leave a last batch of one row, in which the second process
    has none; the test rows are odd in number.
    """
    folder = tmp_path_factory.mktemp("ddp")
    rows = make_rows(61)
    rows = [{**row, "summary": " ".join(row["text"].split()[-3:])} for row in rows]
    parts = {"train": rows[:41], "val": rows[41:58], "test": rows[58:]}
    for split, part in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    common = [
        *COMMON,
        *TASKS[request.param],
        f"model.name_or_path={tiny_llama}",
        *(f"data.{split}={folder / split}.jsonl" for split in parts),
        f"data.cache_dir={folder / 'cache'}",
    ]
    # Micro-batches, too, whose number differs between the two: the sum of a step is the same.
    pair = [
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "data.batch_size=4",
        "data.max_tokens=32",
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_lightning", "train", *common, *pair, "output_dir=two"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = ["data.batch_size=8", "data.max_tokens=null"]
    train(compose_config([*common, *whole, f"output_dir={folder / 'one'}"]))
    return folder, done


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_weights_equal_those_of_one_process(runs):
    folder, _ = runs
    one, two = (
        load_file(folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)
    assert max(t.abs().max() for name, t in one.items() if "lora_B" in name) > 1e-3


def test_metrics_over_uneven_ranks_equal_those_of_one_process(runs):
    one, two = result(runs[0] / "one"), result(runs[0] / "two")
    assert two["world_size"] == 2
    for name, value in one.items():
        if name.startswith(("val/", "test/")):
            assert two[name] == pytest.approx(value, abs=1e-5, rel=1e-6), name
    assert two["before"] == pytest.approx(one["before"], abs=1e-5)
    assert (two["steps"], two["epochs"]) == (one["steps"], one["epochs"])
    # The second process stands in for the absent row of each epoch's last batch with another.
    assert one["tokens"] < two["tokens"] <= one["tokens"] + 2 * 30


def test_one_folder_that_rank_zero_wrote(runs):
    folder, done = runs
    names = {path.name for path in folder.iterdir() if path.suffix != ".jsonl"}
    assert names == {"cache", "one", "two"}
    inside = {path.name for path in (folder / "two").iterdir()}
    kept = {"adapter", "checkpoints", "csv", "tensorboard"}
    assert inside == {*kept, "result.json", "samples.jsonl", ".hydra"}
    assert (folder / "two" / ".hydra" / "config.yaml").is_file()
    assert done.stdout.count("On the 3 test rows") == 1


def test_nothing_is_said_that_no_user_can_act_on(runs):
    said = runs[1].stdout + runs[1].stderr
    for noise in ("sync_dist", "weights_only", "Traceback"):
        assert noise not in said
