"""Random numbers that leave no trace."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from lora_lightning.lora.rng import fork_rng


@pytest.mark.parametrize(
    ("device", "forked"), [("cpu", []), ("meta", []), ("cuda:1", [torch.device("cuda", 1)])]
)
def test_fork_rng_forks_one_gpu_only(device, forked, monkeypatch):
    """torch forks those of all GPUs unless it is told which, and makes a context on each."""
    asked = []
    real = torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices=None: asked.append(devices) or nullcontext()
    )
    with fork_rng(torch.device(device)):
        pass
    assert asked == [forked]
    monkeypatch.setattr(torch.random, "fork_rng", real)
    before = torch.get_rng_state()
    with fork_rng(torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
