"""Fail each file operation of some commands, and report problems.

python experiments/faults/run.py FOLDER [SCENARIO ...]

train:2/3 is every third operation of train, from the second on.
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
    """Write FOLDER/SCENARIO.json for each scenario, and return the number of problems."""
    problems = 0
    for scenario in names:
        name, _, part = scenario.partition(":")
        work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        (work / "from").mkdir()
        harness = Harness(work, write_inputs(work / "from"), *SCENARIOS[name])
        trials = [_reported(harness.after_the_end())]
        places = harness.places()
        print(f"{scenario}: {len(places)} operations", flush=True)
        if part:
            which, of = map(int, part.split("/"))
            places = places[which - 1 :: of]
        for number, (operation, nth) in enumerate(places, 1):
            for fault in FAULTS:
                if fault != "short" or operation.startswith("write "):
                    trials += map(_reported, harness.trials(operation, nth, fault))
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
        (folder / f"{scenario.replace('/', '-of-')}.json").write_text(
            json.dumps(content, indent=2) + "\n"
        )
        print(f"{scenario}: {len(trials)} trials, {len(bad)} problems", flush=True)
        problems += len(bad)
    return problems


def _reported(trial: Trial) -> Trial:
    if trial.problem:
        print(json.dumps(vars(trial), indent=2), flush=True)
    return trial


if __name__ == "__main__":
    sys.exit(min(1, main(Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS))))
