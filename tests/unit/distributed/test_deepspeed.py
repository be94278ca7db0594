"""DeepSpeed's strategy: what it refuses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lightning import UserError
from lora_lightning.distributed.deepspeed import ZeroStrategy


def test_its_absence_is_told(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'lora_lightning\[deepspeed\]'"):
        ZeroStrategy.check("AdamW", "32-true")


@pytest.mark.parametrize(
    ("optimizer", "precision", "message"),
    [
        ("Adafactor", "32-true", "optim.name=Adafactor"),
        ("Muon", "32-true", "optim.name=Muon"),
        ("AdamW", "16-mixed", "bf16-mixed or bf16-true"),
    ],
)
def test_what_would_train_otherwise_is_refused(optimizer, precision, message):
    with pytest.raises(UserError, match=message):
        ZeroStrategy.check(optimizer, precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        (["lora=full"], 0, "the first step gives 2 trainable tensors no gradient, such as bert.sp"),
        (["lora.targets=[query,spare]"], 1, "get no gradient, since the model does not call"),
    ],
    ids=["full", "adapter"],
)
def test_tensors_without_a_gradient_are_found_though_deepspeed_frees_gradients(
    settings, status, message, fast, tiny_bert, rows_jsonl, tmp_path
):
    pytest.importorskip("deepspeed")
    script = Path(__file__).parents[2] / "distributed" / "workers" / "train_with_spare_part.py"
    data = [f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}", "trainer.max_steps=2"]
    one = ["trainer=deepspeed", "trainer.accelerator=cpu", "trainer.devices=1"]
    done = subprocess.run(
        [sys.executable, script, *fast, *one, *data, *settings, f"output_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, message in done.stderr) == (status, True), done.stderr
