"""Commands on a small model whose file operations fail in turn, and their outcomes."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lora_lightning

MODEL = Path(lora_lightning.__file__).parent / "embedded" / "tiny_lm"
SETTINGS = [
    *("trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=1", "lora.rank=2"),
    *("model.name_or_path=base", "data.train=rows.jsonl", "data.cache_dir=cache"),
    *("data.batch_size=6", "data.max_length=16", "test_before=false"),
    *("callbacks.last.every_n_steps=2", "trainer.log_every_n_steps=2"),
    *("callbacks.progress_bar=null", "callbacks.rich_summary=null"),
    "trainer.enable_progress_bar=false",
]
WITHOUT_CURVES = "logger.tensorboard=null"
RUN = ["train", *SETTINGS, WITHOUT_CURVES, "output_dir=run", "resume=auto"]
CURVES = ["train", *SETTINGS, "logger.csv=null", "output_dir=run", "resume=auto"]
SWEEP = ["train", "-m", *SETTINGS, WITHOUT_CURVES, "lora.rank=1,2", "hydra.sweep.dir=sweep"]
HALVING = [*SWEEP, "launcher.halving={eta: 2, rungs: 1}", "trainer.max_epochs=2"]
PACKED = [*SWEEP, "hydra/launcher=packed"]
MERGE = ["merge", "adapter=run/adapter", "output=merged"]
EXPORT = ["export", "adapter=run/adapter", "output=exported", "format=canonical"]
PREDICT = ["predict", "adapter=run/adapter", "input=rows.jsonl", "output=said.jsonl"]


MEASURED = ("seconds", "tokens_per_second", "peak_memory_mib")


class Scenario(NamedTuple):
    """A command.

    Args:
        arguments: Arguments of the command.
        outcome: See Harness.
        before: Commands that make its inputs, and an earlier output that it replaces.
        away: See Harness.
        only: See Harness.
        jobs: See Harness.
    """

    arguments: list[str]
    outcome: Callable[[Path], Any]
    before: list[list[str]]
    away: tuple[str, ...] = ()
    only: str = ""
    jobs: bool = False


def write_inputs(folder: Path) -> Path:
    """Write a model and rows into a folder, and return the folder."""
    shutil.copytree(MODEL, folder / "base")
    words = ("good", "bad", "warm", "cold", "clean", "dirty")
    rows = [
        {"text": f"the {word} food {number}", "label": ("no", "yes")[index % 2]}
        for number in range(4)
        for index, word in enumerate(words)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def outcome_of_run(root: Path) -> Any:
    result = json.loads((root / "run" / "result.json").read_text())
    counts = ("steps", "epochs", "tokens", "status")
    kept = {k: v for k, v in result.items() if k.startswith(("val/", "test/")) or k in counts}
    checkpoints = sorted(path.name for path in (root / "run" / "checkpoints").iterdir())
    return kept, _digests(root / "run" / "adapter"), checkpoints


def outcome_of_sweep(root: Path) -> Any:
    folder = root / "sweep"
    if not (folder / "results.csv").is_file():  # a sweep warns that it cannot write its report
        return None
    with (folder / "results.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]
    return (
        json.loads((folder / "sweep.json").read_text())["status"],
        rows,
        [_digests(folder / str(job) / "adapter") for job in (0, 1)],
    )


def _digests(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files, except for the model card, which has times."""
    own = ("README.md", ".written_by.json")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in own
    }


SCENARIOS = {
    "train": Scenario(RUN, outcome_of_run, [RUN], ("run", "cache")),
    "curves": Scenario(CURVES, outcome_of_run, [CURVES], ("run",), "/tensorboard"),
    # Both runs are complete; the sweep itself writes its files again.
    "sweep": Scenario(SWEEP, outcome_of_sweep, [SWEEP]),
    "sweep-training": Scenario(
        HALVING, outcome_of_sweep, [RUN, HALVING], ("run", "sweep", "cache")
    ),
    "sweep-packed": Scenario(PACKED, outcome_of_sweep, [RUN, PACKED], ("run", "sweep"), jobs=True),
    "merge": Scenario(MERGE, lambda root: _digests(root / "merged"), [RUN, MERGE]),
    "export": Scenario(EXPORT, lambda root: _digests(root / "exported"), [RUN, EXPORT]),
    "predict": Scenario(PREDICT, lambda root: (root / "said.jsonl").read_text(), [RUN, PREDICT]),
}
