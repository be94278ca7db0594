r"""What an adapter costs where a model is used: merged, unmerged, and several in one batch.

    python experiments/latency/latency.py [--rounds 9]

A Llama of 135 M parameters with random weights (speed does not depend on their values) and LoRA of
rank 8 on all linear layers. All ways hold the same base, and take turns in one process; ratios are
medians of the rounds' own ratios to the bare base. Writes results.csv and results.png.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lora_lightning.lora import (
    Adapter,
    AdapterSet,
    LoraConfig,
    load_adapter,
    save_adapter,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "throughput"))

from work import make_llama  # noqa: E402

PROMPT = 128
NEW = 16
ADAPTERS = 8
BARE = "bare base"


def adapters_of(model: nn.Module, folder: Path) -> list[Path]:
    """Folders of several adapters with random values."""
    found = []
    for number in range(ADAPTERS):
        adapter = Adapter(model, LoraConfig(rank=8))
        torch.manual_seed(number)
        with torch.no_grad():
            for tensor in adapter.named_tensors().values():
                tensor.normal_(std=0.02)
        found.append(save_adapter(adapter, folder / str(number)))
        adapter.remove()
    return found


def ways(folder: Path) -> dict[str, dict[int, Callable[..., Any]]]:
    """What is called, by the way of using an adapter and the rows of a batch."""
    make_llama(folder / "llama")

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).eval()

    bare = base()
    folders = adapters_of(bare, folder)
    merged = load_adapter(base(), folders[0]).merge_and_unload().eval()
    several = AdapterSet(bare)
    for number, adapter in enumerate(folders):
        several.add(str(number), adapter)

    def plain(model: nn.Module) -> Callable[..., Any]:
        def call(ids: torch.Tensor, new: int) -> Any:
            if new == 0:
                return model(input_ids=ids, use_cache=False)
            return model.generate(input_ids=ids, attention_mask=ids.ge(0).long(), **length(new))

        return call

    def each_its_own(ids: torch.Tensor, new: int) -> Any:
        names = [str(row) for row in range(len(ids))]
        if new == 0:
            return several(names, input_ids=ids)
        return several.generate(
            names, input_ids=ids, attention_mask=ids.ge(0).long(), **length(new)
        )

    def one_by_one(ids: torch.Tensor, new: int) -> Any:
        for row in range(len(ids)):
            plain(several[str(row)])(ids[row : row + 1], new)

    found: dict[str, dict[int, Callable[..., Any]]] = {}
    for rows in (1, ADAPTERS):
        for name, call in (
            (BARE, plain(bare)),
            ("merged", plain(merged)),
            ("unmerged", plain(several["0"])),
        ):
            found.setdefault(name, {})[rows] = call
    found["8 adapters, one batch"] = {ADAPTERS: each_its_own}
    found["8 adapters, one by one"] = {ADAPTERS: one_by_one}
    return found


def length(new: int) -> dict[str, Any]:
    return {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        called = ways(Path(folder))
        for turn in range(-1, arguments.rounds):  # the first warms up
            for name, by_rows in called.items():
                for count, call in by_rows.items():
                    ids = torch.randint(5, 4000, (count, PROMPT))
                    for kind, new in (("prompt", 0), ("prompt + 16 tokens", NEW)):
                        begun = time.perf_counter()
                        call(ids, new)
                        seconds = round(time.perf_counter() - begun, 5)
                        rows.append([turn, name, count, kind, seconds])
    rows = [row for row in rows if row[0] >= 0]
    with (HERE / "results.csv").open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("round", "way", "rows", "work", "seconds"))
        writer.writerows(rows)
    show(rows)


def show(rows: list[list[Any]]) -> None:
    seconds = {(turn, name, count, kind): value for turn, name, count, kind, value in rows}
    columns = [(1, "prompt"), (1, "prompt + 16 tokens"), (8, "prompt"), (8, "prompt + 16 tokens")]
    names = list(dict.fromkeys(row[1] for row in rows))
    table: dict[str, list[float | None]] = {}
    for name in names:
        table[name] = []
        for count, kind in columns:
            ratios = [
                seconds[turn, name, count, kind] / seconds[turn, BARE, count, kind]
                for turn in range(max(row[0] for row in rows) + 1)
                if (turn, name, count, kind) in seconds
            ]
            table[name].append(statistics.median(ratios) if ratios else None)
    heads = [f"{count} row{'s' if count > 1 else ''}, {kind}" for count, kind in columns]
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join('' if c is None else f'{c:.2f}' for c in cells)} |")
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for index, name in enumerate(names):
        places = [column + 0.16 * (index - 2) for column in range(len(columns))]
        heights = [cell or 0.0 for cell in table[name]]
        axes.bar(places, heights, width=0.15, label=name)
    axes.set_xticks(range(len(columns)), heads, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylabel("time, bare base = 1")
    axes.legend(fontsize=7)
    figure.savefig(HERE / "results.png", dpi=130)


if __name__ == "__main__":
    main()
