r"""A long run that is killed again and again, next to the same run left alone.

    python experiments/soak/soak.py --kills 20 --out experiments/soak/results.csv

Both train the language model that ships on the docstrings of the installed packages, a few thousand
steps. One of them is killed at random moments (SIGKILL, SIGTERM, SIGUSR1 in turn) and gone on with
by `train resume=`; with --devices 2 it is one of its two processes that the signal hits. Compared
are the bytes of the two adapters. Of the run left alone, memory and open files are sampled.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARK = "lora_lightning_soak"
"""In the names of its folders: by it a process that is left behind is known."""
TRAIN = [sys.executable, "-m", "lora_lightning", "train"]
SETTINGS = [
    *("task=lm", "model=tiny_lm", "trainer=cpu", "trainer.precision=32-true", "lora.dropout=0.1"),
    *(
        "data.limit_train=400",
        "data.limit_val=16",
        "data.limit_test=8",
        "data.max_length=96",
        "task.max_new_tokens=16",
    ),
    *("data.batch_size=4", "trainer.val_check_interval=0.5", "test_before=false"),
    *("callbacks.early_stopping=null", "callbacks.last.every_n_steps=20"),
    *("trainer.enable_progress_bar=false", "task.generate_rows=0"),
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model, and room for two processes
    with tempfile.TemporaryDirectory(prefix=MARK) as folder:
        settings = [*SETTINGS, f"data.cache_dir={folder}/cache"]
        if arguments.devices > 1:
            settings += [f"trainer.devices={arguments.devices}", "trainer.strategy=ddp"]
        rounds = steps_of_an_epoch(settings, Path(folder))
        settings.append(f"trainer.max_epochs={-(-arguments.steps // rounds)}")
        alone, samples = left_alone(settings, Path(folder) / "alone")
        killed, kills = again_and_again(
            settings, Path(folder) / "killed", arguments.kills, alone["seconds"], dice
        )
        digests = [digest(Path(folder) / name) for name in ("alone", "killed")]
    later = samples[len(samples) // 4 :]
    row = {
        "devices": arguments.devices,
        "steps": alone["steps"],
        "kills": sum(kills.values()),
        **{f"by {signal.Signals(number).name}": count for number, count in kills.items()},
        "same bytes": digests[0] == digests[1],
        "same steps and tokens": all(alone[k] == killed[k] for k in ("steps", "tokens", "epochs")),
        "rss MiB, quarter of the way": round(later[0][0] / 2**10),
        "rss MiB, end": round(later[-1][0] / 2**10),
        "files, quarter of the way": later[0][1],
        "files, end": later[-1][1],
        "rss MiB, median growth in 1000 steps": round(growth(later, alone["steps"]) / 2**10, 2),
        "processes left behind": len(leftovers()),
    }
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    if arguments.out:
        fresh = not arguments.out.exists()
        with arguments.out.open("a", newline="") as handle:
            writer = csv.DictWriter(handle, list(row), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def steps_of_an_epoch(settings: list[str], folder: Path) -> int:
    """Optimizer steps that an epoch has, from a run of one."""
    subprocess.run(
        [*TRAIN, *settings, "trainer.max_epochs=1", f"output_dir={folder}/one"], check=True
    )
    return int(json.loads((folder / "one" / "result.json").read_text())["steps"])


def left_alone(settings: list[str], run: Path) -> tuple[dict, list[tuple[int, int]]]:
    """Trains without a stop; the result, and resident KiB and open files of its process by time."""
    samples = []
    with subprocess.Popen([*TRAIN, *settings, f"output_dir={run}"]) as process:
        while process.poll() is None:
            if (run / "checkpoints" / "last.ckpt").exists():
                samples.append((resident(process.pid), open_files(process.pid)))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit("the run left alone failed")
    return json.loads((run / "result.json").read_text()), [s for s in samples if s[0]]


def again_and_again(
    settings: list[str], run: Path, kills: int, seconds: float, dice: random.Random
) -> tuple[dict, dict[int, int]]:
    """Trains to the end over so many kills, each after a part of what it would take."""
    done = dict.fromkeys(SIGNALS, 0)
    command = [*TRAIN, *settings, f"output_dir={run}"]
    last = run / "checkpoints" / "last.ckpt"
    while True:
        process = subprocess.Popen(command)
        begun = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == begun):
            time.sleep(0.05)
        number = SIGNALS[sum(done.values()) % len(SIGNALS)]
        if sum(done.values()) < kills:
            time.sleep(dice.uniform(0, 1.5 * seconds / kills))
            family = [process.pid, *children(process.pid)]
            if process.poll() is None:
                os.kill(dice.choice(family), number)
                done[number] += 1
        if process.wait() == 0:
            result = json.loads((run / "result.json").read_text())
            if result["status"] == "completed":
                return result, done
        command = [*TRAIN, f"resume={run}"]


def digest(run: Path) -> str:
    path = run / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def growth(samples: list[tuple[int, int]], steps: int) -> float:
    """KiB in 1000 steps: the median slope between a sample and the one half of the way later."""
    half = len(samples) // 2
    slopes = [samples[i + half][0] - samples[i][0] for i in range(half)]
    share = 0.75 * steps / 2  # steps between the two of a pair
    return statistics.median(slopes) * 1000 / share if slopes else 0.0


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def leftovers() -> list[int]:
    """Processes of this command that outlived theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"lora_lightning" in words and b"train" in words and MARK in str(words):
            found.append(int(path.parent.name))
    return found


def resident(pid: int) -> int:
    """Resident KiB; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def open_files(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


if __name__ == "__main__":
    main()
