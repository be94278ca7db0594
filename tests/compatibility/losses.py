"""Writes the first ten losses of each task, in fp32 and bf16, as hexadecimal floats.

    python tests/compatibility/losses.py before.txt

A change that leaves the computation alone leaves that file alone, to the last bit, on one
machine and with the same number of threads.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lora_lightning.config.compose import compose_config
from lora_lightning.training.run import train

SETTINGS = [
    "trainer=cpu",
    "trainer.max_steps=10",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.accumulate_grad_batches=2",
    "callbacks.progress_bar=null",
    "callbacks.rich_summary=null",
    "callbacks.samples=null",
    "logger.tensorboard=null",
    "lora.dropout=0.1",
    "data.batch_size=4",
    "test_before=false",
    "model.name_or_path=pkg://lora_lightning/embedded/tiny_lm",
]
TASKS = {
    "sentiment": ["data.embedded=reviews", "data.limit_train=96"],
    "summarization": ["task.generate_rows=0", "data.packing=true"],
    "instruct": ["task.generate_rows=0"],
    "lm": ["task.generate_rows=0", "data.packing=false", "data.batch_size=1"],
}


class Losses(Callback):
    """Notes the loss of each optimizer step as it is logged."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            self.found[trainer.global_step] = float(loss)


def rows_of(task: str, folder: Path) -> list[str]:
    """Return the data settings of a task; rows of text that the task learns to write."""
    if task == "sentiment":
        return []
    subjects = ("list", "file", "number", "name", "path", "key", "value", "class")
    rows = [
        {
            "document": f"Take the {subject} {index} and return a copy. It raises an error.",
            "summary": f"Copy the {subject}.",
            "prompt": f"What is {subject} {index}?",
            "completion": f"It is a {subject}.",
            "text": f"The {subject} {index} is returned as it was given. " * (1 + index % 3),
        }
        for index in range(12)
        for subject in subjects
    ]
    columns = {
        "summarization": ("document", "summary"),
        "instruct": ("prompt", "completion"),
        "lm": ("text",),
    }[task]
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps({key: row[key] for key in columns}) + "\n" for row in rows))
    return ["data.embedded=null", f"data.train={path}"]


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    for task, more in TASKS.items():
        for precision in ("32-true", "bf16-true"):
            with tempfile.TemporaryDirectory() as folder:
                config = compose_config(
                    [
                        *SETTINGS,
                        f"task={task}",
                        *rows_of(task, Path(folder)),
                        *more,
                        f"trainer.precision={precision}",
                        f"output_dir={folder}/run",
                    ]
                )
                losses = Losses()
                train(config, callbacks=[losses])
            values = (loss.hex() for _, loss in sorted(losses.found.items()))
            lines.append(" ".join([task, precision, *values]))
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
