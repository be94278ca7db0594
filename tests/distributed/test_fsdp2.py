"""The fused step and the loss of chosen positions under FSDP2: shards gathered, grads reduced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fsdp2_step.py")


@pytest.mark.parametrize("options", [[], ["checkpoint"]], ids=["plain", "checkpointing"])
def test_a_step_equals_that_of_one_process(tiny_llama, options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), str(tiny_llama), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
