"""The private attributes of Lightning that training needs, checked with Lightning 2.6.6."""

from __future__ import annotations

import inspect

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from lora_lightning.training.lightning_internals import (
    attached_trainer,
    can_resume_here,
    counts_after_batch,
    counts_at_step_end,
    is_accumulating,
    reset_counts,
    restore_steps,
    skip_sigterm_broadcast,
)

pytestmark = pytest.mark.filterwarnings("ignore")


class Probe(L.Callback):
    """Notes what the functions say at the end of each batch."""

    def __init__(self):
        self.batches, self.at_end, self.accumulating, self.resumable = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        self.batches.append(counts_after_batch(trainer, index)[0])
        self.at_end.append(counts_at_step_end(trainer))
        self.accumulating.append(is_accumulating(trainer))
        self.resumable.append(can_resume_here(trainer))


def trainer_of(tmp_path, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet, **arguments
    )


def test_counts_during_a_fit_are_those_of_whole_steps(tmp_path):
    """Eight batches, two a step, a validation after the fourth: what is due, is not resumable."""
    probe = Probe()
    trainer = trainer_of(
        tmp_path,
        callbacks=[probe],
        limit_train_batches=8,
        limit_val_batches=1,
        val_check_interval=4,
        accumulate_grad_batches=2,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(BoringModel())
    assert probe.batches == [1, 2, 3, 4, 5, 6, 7, 8]
    assert probe.accumulating == [True, False] * 4
    assert probe.resumable == [False, True, False, False, False, True, False, False]
    assert [counts and counts[0] for counts in probe.at_end] == [
        *(None, 2, None, None, None, 6, None, None)
    ]


def test_module_without_trainer_has_no_attached_trainer():
    assert attached_trainer(BoringModel()) is None


def test_reset_counts_after_a_whole_step_saves_the_state_of_that_step(tmp_path):
    """As after an exception amid the fourth batch: the counts are those of the third."""

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            if index == 3:
                raise ZeroDivisionError

    trainer = trainer_of(
        tmp_path,
        callbacks=[Fails()],
        limit_train_batches=5,
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    with pytest.raises(ZeroDivisionError):
        trainer.fit(BoringModel())
    reset_counts(trainer, 3, 3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    loops = content["loops"]["fit_loop"]
    assert content["global_step"] == 3
    assert loops["epoch_loop.batch_progress"]["current"]["ready"] == 3
    assert loops["epoch_loop.state_dict"]["_batches_that_stepped"] == 3


def test_restore_steps_and_sigterm_broadcast_exist(tmp_path):
    trainer = trainer_of(tmp_path, enable_checkpointing=False)
    steps = restore_steps(trainer)
    assert [callable(getattr(owner, name)) for owner, name in steps] == [True] * 3
    source = inspect.getsource(_TrainingEpochLoop)
    assert "self._broadcast_sigterm_tensor()" in source
    skip_sigterm_broadcast(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None
