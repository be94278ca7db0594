"""Curves for TensorBoard on a disk that fails: the run goes on, and says so once."""

from __future__ import annotations

import errno

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lora_lightning.training.callbacks.loggers import EventsLogger


def scalars(folder) -> list[int]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [event.step for event in found.Scalars("loss")]


@pytest.fixture
def failing(monkeypatch):
    """Lets TensorBoard's own writer fail from a number of records on."""

    def fail(after: int, number: int) -> None:
        write, count = RecordWriter.write, 0

        def failing_write(self, data):
            nonlocal count
            count += 1
            if count > after:
                raise OSError(number, "no")
            write(self, data)

        monkeypatch.setattr(RecordWriter, "write", failing_write)

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_events_logger_on_a_failing_disk_warns_once(number, failing, tmp_path, capsys):
    failing(1 + 3, number)  # the first is TensorBoard's own
    logger = EventsLogger(tmp_path, name="", version="")
    for step in range(50):
        logger.log_metrics({"loss": 1.0}, step)
        logger.experiment.add_text("samples", "good", step)
    logger.log_hyperparams({"rank": 8}, {"final/loss": 1.0})
    logger.fill_hparams([Summary()])
    logger.save()
    logger.finalize("success")
    errors = capsys.readouterr().err
    assert errors.count("no more curves for TensorBoard: ") == 1
    assert "Traceback" not in errors
    assert scalars(tmp_path)[:2] == [0, 1]


def test_events_logger_raises_other_errors(tmp_path):
    logger = EventsLogger(tmp_path, name="", version="")
    with pytest.raises(ValueError, match="not supported"):
        logger.log_metrics({"loss": object()}, 0)
    logger.finalize("success")


def test_events_logger_without_a_folder_warns_once(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EROFS, "no")

    monkeypatch.setattr("os.makedirs", fail)
    monkeypatch.setattr("os.mkdir", fail)
    logger = EventsLogger(tmp_path / "a", name="b", version="")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.fill_hparams([Summary()])
    logger.finalize("success")
    assert capsys.readouterr().err.count("no more curves") == 1
