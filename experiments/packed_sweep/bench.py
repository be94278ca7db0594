r"""Time and memory of eight jobs, packed and not: as commands, and in a warm process.

    python experiments/packed_sweep/bench.py --rounds 3 --out experiments/packed_sweep/cpu.csv

Each way runs the same eight configs (ranks 1 to 32, two learning rates) in fresh folders, in turn.
`packed` and `process` are the two launchers' commands, from start to end. `warm-packed` and `warm`
are the same jobs within a process that has everything imported, as one pack and one after another;
its imports are not counted. Memory is the proportional set size of the whole process tree, sampled:
pages that processes share are counted once. `together` is eight processes at once, for their
memory. The final losses of all ways are compared.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

JOBS = ["lora.rank=1,4,8,32", "optim.lr=1e-3,3e-3"]
COMMON = ["trainer.max_epochs=1", "trainer.precision=32-true"]
WAYS = ("packed", "process", "warm-packed", "warm", "together")
AGAINST = {"process": "packed", "together": "packed", "warm": "warm-packed"}
"""What each way is compared with."""
WARM = str(Path(__file__).with_name("warm.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512, help="training rows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="further settings of all jobs")
    arguments = parser.parse_args()
    more = [
        *COMMON,
        f"data.limit_train={arguments.rows}",
        f"data.batch_size={arguments.batch_size}",
        *arguments.overrides,
    ]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for way in arguments.ways:
                if way == "together" and number:
                    continue
                sweep = Path(folder) / f"{way}{number}"
                run = measured(way, more, sweep)
                runs.append({"round": number, "way": way, **run})
                print(json.dumps(runs[-1]), flush=True)
    losses = [json.loads(run.pop("losses")) for run in runs]
    gap = max(abs(a - b) for found in losses for a, b in zip(found, losses[0], strict=True))
    table(runs, gap)
    if arguments.out:
        with arguments.out.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(runs[0]))
            writer.writeheader()
            writer.writerows(runs)


def measured(way: str, overrides: list[str], sweep: Path) -> dict[str, object]:
    """Runs the jobs in one of the ways; seconds, peak memory, and the jobs' final losses."""
    train = [sys.executable, "-m", "lora_lightning", "train", "-m", *JOBS, *overrides]
    command = {
        "packed": [*train, "hydra/launcher=packed"],
        "process": train,
        "together": [*train, "launcher.jobs=8"],
        "warm": [sys.executable, WARM, *JOBS, *overrides],
        "warm-packed": [sys.executable, WARM, "--packed", *JOBS, *overrides],
    }[way]
    command.append(f"hydra.sweep.dir={sweep}")
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = Peak(process.pid)
    if process.wait():
        raise SystemExit(f"{way} failed: {' '.join(command)}")
    seconds = time.monotonic() - started
    if way.startswith("warm"):
        seconds = float((sweep / "seconds").read_text())
    results = [json.loads((sweep / str(job) / "result.json").read_text()) for job in range(8)]
    return {
        "seconds": round(seconds, 2),
        "peak_mib": round(peak.stop() / 1024),
        "steps": results[0]["steps"],
        "losses": json.dumps([result["test/loss"] for result in results]),
    }


class Peak:
    """Samples the memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.stopped = pid, 0, False
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        """The peak in KiB."""
        self.stopped = True
        self.thread.join()
        return self.peak

    def _sample(self) -> None:
        while not self.stopped:
            self.peak = max(self.peak, sum(map(proportional, below(self.pid))))
            time.sleep(0.25)


def below(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += below(int(child))
    return found


def proportional(pid: int) -> int:
    """Proportional set size in KiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def table(runs: list[dict[str, object]], gap: float) -> None:
    ways = list(dict.fromkeys(str(run["way"]) for run in runs))
    times = {way: [float(r["seconds"]) for r in runs if r["way"] == way] for way in ways}
    memory = {way: max(int(r["peak_mib"]) for r in runs if r["way"] == way) for way in ways}
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"largest difference of a final test loss between the ways: {gap:.2g}\n")
    print("| way | seconds, median | packed takes | peak MiB | packed needs |")
    print("|---|---|---|---|---|")
    for way in ways:
        packed = AGAINST.get(way, "")
        ratios = [a / b for a, b in zip(times.get(packed, ()), times[way], strict=False)]
        ratio = f"{statistics.median(ratios):.2f}x" if ratios else ""
        need = f"{memory[packed] / memory[way]:.2f}x" if ratios else ""
        seconds = statistics.median(times[way])
        print(f"| {way} | {seconds:.1f} | {ratio} | {memory[way]} | {need} |")


if __name__ == "__main__":
    main()
