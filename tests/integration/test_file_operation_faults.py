"""Operations on files fail one by one: one message, and the same command makes up for it."""

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


def harness_of(name: str, folder: Path) -> Harness:
    (folder / "from").mkdir()
    return Harness(folder, write_inputs(folder / "from"), *SCENARIOS[name])


@pytest.mark.parametrize("name", ["merge", "export", "predict"])
def test_all_operations_of_a_command(name, tmp_path):
    harness = harness_of(name, tmp_path)
    trials = [harness.after_the_end()]
    for called, nth in harness.places():
        for fault in FAULTS:
            if fault != "short" or called.startswith("write "):
                trials += harness.trials(called, nth, fault)
    harness.close()
    assert len(trials) > 4 * len(harness.operations)
    assert [vars(trial) for trial in trials if trial.problem] == []


@pytest.mark.parametrize(("name", "part"), [("train", 0), ("train", 1), ("sweep", 0)])
def test_all_kinds_of_operations(name, part, tmp_path):
    """The first of those that are called alike, each with another of the faults."""
    harness = harness_of(name, tmp_path)
    trials = [harness.after_the_end()]
    kinds = list(dict.fromkeys(called for called, _ in harness.places()))
    for number, called in enumerate(kinds):
        fault = FAULTS[number // 2 % len(FAULTS)]
        if number % 2 == part and (fault != "short" or called.startswith("write ")):
            trials += harness.trials(called, 1, fault)
    harness.close()
    assert len(trials) > len(kinds) // 3
    assert {"killed", "cut", "full", "broken"} <= {trial.fault for trial in trials}
    assert [vars(trial) for trial in trials if trial.problem] == []
