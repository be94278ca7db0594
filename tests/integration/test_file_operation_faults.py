"""File operations fail one by one: one message, and the same command then succeeds."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments" / "faults"))
from harness import FAULTS, Harness
from scenarios import SCENARIOS, write_inputs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="no C compiler"),
]


def make_harness(name: str, folder: Path) -> Harness:
    (folder / "from").mkdir()
    return Harness(folder, write_inputs(folder / "from"), *SCENARIOS[name])


@pytest.mark.parametrize("name", ["merge", "export", "predict"])
def test_command_recovers_from_each_failed_operation(name, tmp_path):
    harness = make_harness(name, tmp_path)
    trials = [harness.after_the_end()]
    for operation, nth in harness.places():
        for fault in FAULTS:
            if fault != "short" or operation.startswith("write "):
                trials += harness.trials(operation, nth, fault)
    harness.close()
    assert len(trials) > 4 * len(harness.operations)
    assert [vars(trial) for trial in trials if trial.problem] == []


@pytest.mark.parametrize(("name", "part"), [("train", 0), ("train", 1), ("sweep", 0)])
def test_command_recovers_from_each_kind_of_failed_operation(name, part, tmp_path):
    """The first operation of each name, each with another fault."""
    harness = make_harness(name, tmp_path)
    trials = [harness.after_the_end()]
    kinds = list(dict.fromkeys(operation for operation, _ in harness.places()))
    for number, operation in enumerate(kinds):
        fault = FAULTS[number // 2 % len(FAULTS)]
        if number % 2 == part and (fault != "short" or operation.startswith("write ")):
            trials += harness.trials(operation, 1, fault)
    harness.close()
    assert len(trials) > len(kinds) // 3
    assert {"killed", "cut", "full", "broken"} <= {trial.fault for trial in trials}
    assert [vars(trial) for trial in trials if trial.problem] == []


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("sweep-training", "rename /sweep/0/.hydra/.hydra.yaml.*.tmp /sweep/0/.hydra/hydra.yaml"),
        ("sweep-training", "write /sweep/1/.result.json.*.tmp"),
        ("sweep-packed", "write /sweep/1/checkpoints/.last.ckpt.*.tmp"),
    ],
)
def test_sweep_recovers_from_a_full_disk_and_a_kill(name, operation, tmp_path):
    """While its jobs train: faults of the launcher alone, and of a pack."""
    harness = make_harness(name, tmp_path)
    assert (operation, 1) in harness.places()
    trials = [
        trial for fault in ("full", "killed") for trial in harness.trials(operation, 1, fault)
    ]
    harness.close()
    assert [trial.fault for trial in trials] == ["full", "killed", "cut"]
    assert [vars(trial) for trial in trials if trial.problem] == []
