"""Ranks and first matrices that come from data are the same in every process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_start_as_one_does(tiny_bert, rows_jsonl, tmp_path):
    found = []
    for count in (1, 2):
        run = tmp_path / str(count)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lora_lightning", "train", "lora=eva", "lora.rank=3"),
                *("trainer.accelerator=cpu", f"trainer.devices={count}", "trainer.max_steps=1"),
                *("trainer.strategy=ddp", "trainer.precision=32-true", "optim.lr=1e-12"),
                *("trainer.enable_progress_bar=false", "callbacks.progress_bar=null"),
                *(f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
                f"output_dir={run}",
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        found.append((config["rank_pattern"], load_file(run / "adapter/adapter_model.safetensors")))
    (ranks, one), (other_ranks, two) = found
    assert ranks == other_ranks
    for name, tensor in one.items():
        if "lora_A" in name:
            assert (tensor - two[name]).abs().max() < 1e-5, name
