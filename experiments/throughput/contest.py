"""Who does what: contestants, their work, and running them in turn in fresh processes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]
"""What was measured, a dict for each run."""


@dataclass(frozen=True)
class Work:
    """What is trained: all contestants of a study get the same."""

    kind: str = "decoder"
    model: str = ""
    train: str = ""
    ordered: str = ""
    tokens: tuple[int, ...] = ()
    """Tokens of each row, in the order of training."""
    targets: tuple[int, ...] = ()
    max_length: int = 512
    batch_size: int = 8
    accumulate: int = 1
    """Batches of an optimizer step."""
    steps: int = 4
    rank: int = 8
    lr: float = 1e-4

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulate

    @property
    def timed(self) -> slice:
        """The rows of all steps but the first."""
        return slice(self.rows_per_step, self.rows_per_step * self.steps)


@dataclass(frozen=True)
class Contestant:
    """One way to do the work."""

    name: str
    library: str
    precision: str
    checkpointing: bool = False
    quantization: str | None = None
    """nf4: the base in 4 bits."""
    overrides: tuple[str, ...] = field(default=())


def ours(precision: str, *overrides: str, name: str = "ours") -> Contestant:
    """Ours, which takes quantisation and the rest as overrides."""
    return Contestant(f"{name} {precision}", "ours", precision, overrides=overrides)


def peer(library: str, precision: str, **settings: Any) -> Contestant:
    label = "".join(f" {key}" for key, value in settings.items() if value)
    return Contestant(f"{library} {precision}{label}", library, precision, **settings)


def run(contestant: Contestant, work: Work, folder: Path, timeout: float) -> dict[str, Any]:
    """Runs a contestant in a fresh process, until its last step; what its clock measured."""
    output = Path(tempfile.mkdtemp(dir=folder))
    result = output / "clock.json"
    environment = {
        **os.environ,
        "BENCH_STEPS": str(work.steps),
        "BENCH_RESULT": str(result),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = ours_command(contestant, work, output)
    if contestant.library != "ours":
        settings = {
            "kind": work.kind,
            "model": work.model,
            "ordered": work.ordered,
            "batch_size": work.batch_size,
            "accumulate": work.accumulate,
            "steps": work.steps,
            "rank": work.rank,
            "lr": work.lr,
            "precision": contestant.precision,
            "checkpointing": contestant.checkpointing,
            "quantization": contestant.quantization,
            "max_length": work.max_length,
            "output": str(output / "run"),
        }
        (output / "work.json").write_text(json.dumps(settings))
        command = [str(HERE / "peer.py"), contestant.library, str(output / "work.json")]
    with (output / "log").open("w") as log:
        environment["BENCH_STARTED"] = repr(time.time())
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=output, stdout=log, stderr=log
        )
        deadline = time.monotonic() + timeout
        while not result.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()  # what a run does after its last step is not measured
        process.wait()
    if not result.exists():
        tail = "\n".join((output / "log").read_text().splitlines()[-15:])
        raise SystemExit(f"{contestant.name} did not finish:\n{tail}")
    measured: dict[str, Any] = json.loads(result.read_text())
    shutil.rmtree(output)
    ends = measured["ends"]
    seconds = ends[-1] - ends[0]
    return {
        "seconds": seconds,
        "tokens_per_second": sum(work.tokens[work.timed]) / seconds if work.steps > 1 else 0.0,
        "peak_mib": measured["peak_mib"],
        "first_step": ends[0],
        "loss": measured["losses"],
    }


def ours_command(contestant: Contestant, work: Work, output: Path) -> list[str]:
    task = ["task=classification", "model=minilm"]
    if work.kind == "decoder":
        task = ["task=summarization", "task.generate_rows=0"]
    return [
        *("-m", "lora_lightning", "train", *task),
        f"model.name_or_path={work.model}",
        f"data.train={work.train}",
        f"data.val={work.train}",
        "data.limit_val=8",
        "data.test_fraction=0",
        f"data.max_length={work.max_length}",
        f"data.batch_size={work.batch_size}",
        f"trainer.accumulate_grad_batches={work.accumulate}",
        f"lora.rank={work.rank}",
        f"optim.lr={work.lr}",
        "optim.scheduler=constant",
        f"trainer.max_steps={work.steps}",
        f"trainer.precision={contestant.precision}",
        "test_before=false",
        "+callbacks.bench._target_=ours.LightningClock",
        f"output_dir={output / 'run'}",
        *contestant.overrides,
    ]


def compete(
    name: str, contestants: list[Contestant], work: Work, arguments: argparse.Namespace
) -> Rows:
    """Rounds of all contestants in turn; one row for each run."""
    rows = []
    for turn in range(arguments.rounds):
        for contestant in contestants:
            found = run(contestant, work, arguments.work, arguments.timeout)
            rows.append({"study": name, "round": turn, "contestant": contestant.name, **found})
            print(
                f"{name} {turn} {contestant.name:28} {found['seconds']:8.2f} s "
                f"{found['tokens_per_second']:8.0f} tokens/s {found['peak_mib']:8.0f} MiB "
                f"first step {found['first_step']:6.1f} s   loss "
                + " ".join(f"{loss:.4f}" for loss in found["loss"]),
                flush=True,
            )
    return rows
