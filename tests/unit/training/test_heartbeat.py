"""A signal ends a run in the middle of an evaluation, and a run in a log says what it does."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lora_lightning.training.callbacks import heartbeat
from lora_lightning.training.callbacks.graceful_stop import Stopped, StopSignals
from lora_lightning.training.callbacks.heartbeat import Heartbeat

TRAINER = SimpleNamespace(state=SimpleNamespace(fn="fit"), fit_loop=SimpleNamespace())
TRAINER.fit_loop.epoch_loop = SimpleNamespace()


@pytest.mark.parametrize("what", ["test", "validation"])
def test_signal_within_an_evaluation_ends_the_run(what):
    signals = StopSignals()
    with signals:
        signals.on_train_start(TRAINER, None)
        os.kill(os.getpid(), signal.SIGTERM)  # a step is ended first
        assert signals.received == signal.SIGTERM
        getattr(signals, f"on_{what}_start")(TRAINER, None)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        getattr(signals, f"on_{what}_end")(TRAINER, None)
        signals.on_train_start(TRAINER, None)
        os.kill(os.getpid(), signal.SIGTERM)


class Evaluated(L.LightningModule):
    """Notes what the heartbeat would say in each hook."""

    def __init__(self, beat: Heartbeat) -> None:
        super().__init__()
        self.beat, self.said = beat, []
        self.weight = torch.nn.Parameter(torch.ones(()))

    def _note(self, *_, **__):
        self.said.append(self.beat.line())

    def training_step(self, batch, _):
        self._note()
        return self.weight * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    validation_step = test_step = on_validation_epoch_end = on_test_epoch_end = setup = _note


def test_heartbeat_line_names_epoch_and_step():
    beat = Heartbeat(wanted=True)
    module, data = Evaluated(beat), DataLoader(torch.ones(2, 1))
    assert beat.line() == "preparing the model and the data"
    beat.trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    beat.trainer.fit(module, data, data)
    beat.trainer.test(module, DataLoader(torch.ones(3, 1)), verbose=False)
    assert list(dict.fromkeys(module.said)) == [
        "training: epoch 1, step 0",
        "training: epoch 1, step 1",
        "validation: 0 of 2 batches",
        "validation: 1 of 2 batches",
        "validation: 2 of 2 batches, now generating texts or measuring",
        "preparing the model and the data",  # of the test, whose batches nobody has counted
        "test: 0 of 3 batches",
        "test: 1 of 3 batches",
        "test: 2 of 3 batches",
        "test: 3 of 3 batches, now generating texts or measuring",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_heartbeat_prints_to_a_file_and_not_to_a_terminal(monkeypatch, terminal):
    told, lines = threading.Event(), []
    monkeypatch.setattr(heartbeat, "say", lambda line: (lines.append(line), told.set()))
    monkeypatch.setattr(heartbeat.sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(Heartbeat, "EVERY", 0.01)
    with Heartbeat(wanted=True) as beat:
        assert beat.wanted is not terminal
        if not terminal:
            assert told.wait(60)
    assert lines[:1] == ([] if terminal else ["preparing the model and the data"])
