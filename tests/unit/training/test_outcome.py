"""How a run ended: what result.json records, and what the user gets."""

from __future__ import annotations

import errno

import pytest

from lora_lightning.config.compose import compose_config
from lora_lightning.errors import ProcessLost, UserError
from lora_lightning.training.callbacks.graceful_stop import StopSignals
from lora_lightning.training.outcome import recorded_outcome


@pytest.mark.parametrize(
    ("error", "kind", "recorded"),
    [
        (OSError(errno.EIO, "Input/output error"), UserError, "UserError: the disk"),
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "UserError: the disk"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: 9"), ProcessLost, "Proc"),
        (RuntimeError("of the user's code"), RuntimeError, "RuntimeError: of the user's code"),
        (UserError("lora.rank=0: must be at least 1."), UserError, "UserError: lora.rank=0"),
    ],
    ids=["failing disk", "full disk", "killed worker", "other", "mistake"],
)
def test_result_records_the_error_that_the_user_gets(error, kind, recorded, tmp_path):
    """A packed sweep tells by it whether its jobs failed by a mistake, with exit status 2."""
    result: dict[str, object] = {}
    run = tmp_path / "run"
    with (
        pytest.raises(kind) as raised,
        recorded_outcome(result, run, compose_config([]), StopSignals()),
    ):
        raise error
    assert result["status"] == "failed"
    assert str(result["error"]).startswith(recorded)
    assert str(result["error"]).endswith(str(raised.value))
