"""last.ckpt: when it is due by the clock, and that training does not wait for the disk."""

from __future__ import annotations

import threading

import pytest
from lightning.pytorch.callbacks import Callback

from lora_lightning.config.compose import compose_config
from lora_lightning.training.callbacks import last_checkpoint
from lora_lightning.training.callbacks.last_checkpoint import LastCheckpoint
from lora_lightning.training.run import train


@pytest.fixture
def run(fast, tiny_bert, rows_jsonl, tmp_path):
    """Ten steps, with callbacks after those of the config: those that are told of saves."""

    def runs(*callbacks: Callback, **last: float | None) -> None:
        config = compose_config(
            [
                *(*fast, f"model.name_or_path={tiny_bert}", f"data.train={rows_jsonl}"),
                *("data.batch_size=4", "trainer.max_steps=10", "callbacks.last=null"),
                *("callbacks.early_stopping=null", "callbacks.samples=null", "logger=none"),
                *(f"output_dir={tmp_path / 'run'}", "trainer.limit_val_batches=0"),
            ]
        )
        own = LastCheckpoint(str(tmp_path / "run" / "checkpoints"), **last)
        train(config, callbacks=[own, *callbacks])

    return runs


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, int]]:
    """What happened in order: the steps at which a write began and ended."""
    found: list[tuple[str, int]] = []
    real = last_checkpoint._write

    def write(path, content, **settings):
        found.append(("begins", content["global_step"]))
        real(path, content, **settings)
        found.append(("written", content["global_step"]))

    monkeypatch.setattr(last_checkpoint, "_write", write)
    return found


class Clock(Callback):
    """A clock that goes on by so many minutes with each step, and by nothing else."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.now = minutes, 1e6

    def monotonic(self) -> float:
        return self.now

    def on_train_batch_start(self, *_: object) -> None:
        self.now += 60 * self.minutes


@pytest.mark.parametrize(
    ("every_n_minutes", "steps"), [(5.0, [3, 6, 9, 10]), (4.0, [2, 4, 6, 8, 10]), (None, [10])]
)
def test_last_checkpoint_every_n_minutes_is_saved_by_the_clock(
    every_n_minutes, steps, run, events, monkeypatch
):
    clock = Clock(minutes=2)
    monkeypatch.setattr(last_checkpoint, "time", clock)
    run(clock, every_n_minutes=every_n_minutes)
    assert [step for kind, step in events if kind == "written"] == steps


def test_last_checkpoint_write_does_not_block_training(run, events, monkeypatch):
    """The write of step 3 stands still until step 5 is done."""
    released, write = threading.Event(), last_checkpoint._write

    def slow(path, content, **settings):
        if not released.wait(20):
            events.append(("held up", content["global_step"]))
        write(path, content, **settings)

    class Notes(Callback):
        def on_train_batch_end(self, trainer, *_: object) -> None:
            events.append(("step", trainer.global_step))
            if trainer.global_step == 5:
                released.set()

    monkeypatch.setattr(last_checkpoint, "_write", slow)
    run(Notes(), every_n_minutes=None, every_n_steps=3)
    assert events.index(("step", 5)) < events.index(("begins", 3)) < events.index(("written", 3))
    assert "held up" not in dict(events)
    assert [step for kind, step in events if kind == "written"] == [3, 6, 9, 10]
