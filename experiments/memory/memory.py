r"""What training takes in memory, by method, batch and length, and the smallest machine that does.

    python experiments/memory/memory.py [--machine | --files]

A Llama of 135 M parameters with random weights, by LoRA, LoRA with gradient checkpointing, on a
base in 4 bits, by both, and whole; measured as in experiments/plan. With --machine, as root: the
least memory of a control group (libraries and all, no swap) in which two steps are trained to their
end, to 5 %. With --files: the bytes of what a run leaves behind.
Writes results.csv and results.png, machine.csv, or files.csv, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "plan"))

from measure import make, predicted, run  # noqa: E402

METHODS = {
    "full": ["lora=full", "optim.lr=1e-5"],
    "LoRA": [],
    "LoRA, checkpointing": ["model.gradient_checkpointing=true"],
    "QLoRA": ["model.quantization=nf4"],
    "QLoRA, checkpointing": ["model.quantization=nf4", "model.gradient_checkpointing=true"],
}
SIZES = ((1, 128), (4, 128), (4, 512))
"""Rows of a batch, and tokens of a row."""
MACHINE = (4, 128)
QUICK = [
    *("trainer.max_steps=2", "trainer.limit_val_batches=1", "data.limit_val=2"),
    *("trainer.limit_test_batches=1", "test_before=false", "logger=none"),
    "trainer.enable_progress_bar=false",
]
MIB = 2**20
GROUPS = Path("/sys/fs/cgroup")


def overrides_of(model: Path, method: str, rows: int, length: int) -> list[str]:
    return [
        *("task=lm", f"model.name_or_path={model}", f"data.train={model}/rows.jsonl"),
        *("trainer.precision=32-true", "data.max_tokens=null"),
        *("lora.rank=8", f"data.batch_size={rows}", f"data.max_length={length}"),
        *("task.generation.max_new_tokens=8", *METHODS[method]),
    ]


def fits(overrides: list[str], limit: int) -> bool:
    """Whether two steps are trained in a control group of so many bytes."""
    second = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if second else GROUPS / "memory") / f"lora_lightning-{os.getpid()}"
    group.mkdir()
    try:
        name = "memory.max" if second else "memory.limit_in_bytes"
        (group / name).write_text(str(limit))
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-m", "lora_lightning", "train", *overrides, *QUICK]
            command += ["callbacks=none"]
            done = subprocess.run(
                ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command,
                 f"output_dir={output}"],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                check=False,
            )  # fmt: skip
        return done.returncode == 0
    finally:
        group.rmdir()


def smallest(overrides: list[str]) -> int:
    """MiB of the smallest control group, to 5 %."""
    low, high = 300, 8192
    while not fits(overrides, high * MIB):
        low, high = high, 2 * high
    while high > 1.05 * low:
        middle = int((low * high) ** 0.5)
        low, high = (low, middle) if fits(overrides, middle * MIB) else (middle, high)
    return high


def files(overrides: list[str]) -> dict[str, int]:
    """Bytes of the checkpoint to go on from, and of the weights to use, after two steps."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "lora_lightning", "train", *overrides, *QUICK]
        command += ["callbacks.last.every_n_steps=1"]
        subprocess.run([*command, f"output_dir={output}"], check=True, capture_output=True)
        found = {"checkpoint": "last*.ckpt", "weights": "*.safetensors"}
        return {
            name: sum(path.stat().st_size for path in Path(output).rglob(pattern))
            for name, pattern in found.items()
        }


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict]) -> None:
    heads = [f"{rows} x {length}" for rows, length in SIZES]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for method in METHODS:
        own = [row["measured"] for row in rows if row["method"] == method]
        print(f"| {method} | {' | '.join(f'{value:,.0f}' for value in own)} |")
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for index, method in enumerate(METHODS):
        own = [row["measured"] / 1024 for row in rows if row["method"] == method]
        places = [column + 0.16 * (index - 2) for column in range(len(SIZES))]
        axes.bar(places, own, width=0.15, label=method)
    axes.set_xticks(range(len(SIZES)), heads)
    axes.set(xlabel="rows x tokens", ylabel="peak, GiB")
    axes.legend(fontsize=8, loc="upper left")
    figure.savefig(HERE / "results.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", action="store_true")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    model = work / "llama"
    if not model.exists():
        make("llama", model)
    rows = []
    for method in METHODS:
        if arguments.machine:
            rows.append({"method": method, "mib": smallest(overrides_of(model, method, *MACHINE))})
            print(rows[-1], flush=True)
            continue
        if arguments.files:
            rows.append({"method": method, **files(overrides_of(model, method, *MACHINE))})
            print(rows[-1], flush=True)
            continue
        for count, length in SIZES:
            kept = work / f"{method}-{count}-{length}.json"  # a table that was broken off goes on
            overrides = overrides_of(model, method, count, length)
            if not kept.exists():
                kept.write_text(json.dumps(run(overrides)))
            told = predicted(overrides)
            rows.append(
                {
                    "method": method,
                    "rows": count,
                    "length": length,
                    **told,
                    "measured": json.loads(kept.read_text()),
                }
            )
            print(rows[-1], flush=True)
    if arguments.machine or arguments.files:
        write(HERE / ("machine.csv" if arguments.machine else "files.csv"), rows)
        return
    write(HERE / "results.csv", rows)
    table(rows)


if __name__ == "__main__":
    main()
