"""DeepSpeed's strategy: what it refuses."""

from __future__ import annotations

import importlib.util

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
