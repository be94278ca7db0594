"""Fails each operation on files of some commands, and tells what is not as it should be.

python experiments/faults/run.py FOLDER [SCENARIO ...]

train:2/3 is the second third of the operations of train.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from harness import FAULTS, Harness, Trial
from scenarios import SCENARIOS, write_inputs


def main(folder: Path, names: list[str]) -> int:
    """Writes FOLDER/SCENARIO.json. Returns how many trials have a problem."""
    problems = 0
    for asked in names:
        name, _, part = asked.partition(":")
        work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        (work / "from").mkdir()
        scenario = SCENARIOS[name]
        harness = Harness(work, write_inputs(work / "from"), *scenario)
        trials = [_told(harness.after_the_end())]
        places = harness.places()
        print(f"{asked}: {len(places)} operations", flush=True)
        if part:
            which, of = map(int, part.split("/"))
            places = places[which - 1 :: of]
        for number, (called, nth) in enumerate(places, 1):
            for fault in FAULTS:
                if fault != "short" or called.startswith("write "):
                    trials += map(_told, harness.trials(called, nth, fault))
            if number % 5 == 0:
                print(f"  {number}, {len(trials)} trials", flush=True)
        harness.close()
        bad = [trial for trial in trials if trial.problem]
        content = {
            "operations": len(places),
            "trials": Counter(trial.fault for trial in trials),
            "ended well although": Counter(t.fault for t in trials if t.status == 0),
            "problems": [vars(trial) for trial in bad],
        }
        (folder / f"{asked.replace('/', '-of-')}.json").write_text(
            json.dumps(content, indent=2) + "\n"
        )
        print(f"{asked}: {len(trials)} trials, {len(bad)} problems", flush=True)
        problems += len(bad)
    return problems


def _told(trial: Trial) -> Trial:
    if trial.problem:
        print(json.dumps(vars(trial), indent=2), flush=True)
    return trial


if __name__ == "__main__":
    sys.exit(min(1, main(Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS))))
