r"""Arithmetic and time of a training step: LoRA by rank against full fine-tuning, by model size.

    python experiments/compute/compute.py [--rounds 3]

Operations are counted as they are dispatched (torch.utils.flop_counter), of forward and backward,
on tensors without values. Seconds are of forward, backward and the update:
medians of steps in one process, the methods in turn, as ratios to full fine-tuning.
Writes results.csv and results.png, and prints the tables.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lora_lightning.config.compose import compose_config, settings_of
from lora_lightning.training.module import LoraModule
from lora_lightning.training.preflight.dry_run import dry_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROWS, WIDTH = 2, 256
RANKS = (1, 4, 16, 64, 256)
FULL = 0
"""The "rank" of full fine-tuning."""
SIZES = {
    # width, feed-forward, layers, heads, heads of keys and values, vocabulary
    "9 M": (256, 768, 8, 4, 2, 8192),
    "37 M": (512, 1408, 10, 8, 4, 16384),
    "135 M": (576, 1536, 30, 9, 3, 49152),
}


def save_config(name: str, folder: Path) -> Path:
    """A model's config.json, from which it can be built without weights."""
    width, inner, layers, heads, groups, vocabulary = SIZES[name]
    place = folder / name.replace(" ", "")
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ).save_pretrained(place)
    return place


def config_of(model: Path, rank: int) -> DictConfig:
    """The settings of a run that takes ROWS rows of WIDTH tokens a step."""
    method = ["lora=full"] if rank == FULL else [f"lora.rank={rank}"]
    return compose_config(
        [
            *("task=lm", "trainer=cpu", "trainer.precision=32-true", "model.dtype=float32"),
            *(f"model.name_or_path={model}", f"data.max_length={WIDTH}", "data.max_tokens=null"),
            *(f"data.batch_size={ROWS}", *method),
        ]
    )


def operations(model: Path, rank: int) -> int:
    """Of a step's forward and backward pass, as `lora-lightning plan` goes through them."""
    with (
        dry_run(config_of(model, rank), torch.device("cpu")) as run,
        FlopCounterMode(display=False) as counter,
    ):
        run.forward(ROWS).backward()
    return int(counter.get_total_flops())


def seconds(model: Path, rank: int, steps: int) -> float:
    """Median of a step's forward pass, backward pass and update, of weights that are random."""
    settings = settings_of(config_of(model, rank))
    module = LoraModule(
        settings.task,
        settings.model,
        settings.lora,
        settings.optim,
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    module.configure_model()
    assert module.model is not None
    optimizer = module.build_optimizer()
    ids = torch.randint(0, 8000, (ROWS, WIDTH))
    batch = module.task.locate({"input_ids": ids, "labels": ids})
    times = []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        module.training_loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def by_rank(model: Path) -> tuple[dict[int, int], float]:
    """Operations by rank, and the rank at which they are those of full fine-tuning.

    They are affine in the rank, to the last one, so two ranks tell all.
    """
    full, first, last = (operations(model, rank) for rank in (FULL, RANKS[0], RANKS[-1]))
    slope = (last - first) / (RANKS[-1] - RANKS[0])
    counts = {rank: round(first + slope * (rank - RANKS[0])) for rank in RANKS}
    return {FULL: full, **counts}, RANKS[0] + (full - first) / slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in SIZES for row in measured(name, Path(folder), arguments)]
    with (HERE / "results.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    show(rows)
    draw(rows)


def measured(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """A row for each rank."""
    model = save_config(name, folder)
    counts, crossover = by_rank(model)
    ratios: dict[int, list[float]] = {rank: [] for rank in RANKS}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model)).save_pretrained(model)
    for _ in range(arguments.rounds):
        full = seconds(model, FULL, arguments.steps)
        for rank in RANKS:
            ratios[rank].append(seconds(model, rank, arguments.steps) / full)
    rows = []
    for rank in RANKS:
        rows.append(
            {
                "model": name,
                "rank": rank,
                "operations": counts[rank],
                "of_full": round(counts[rank] / counts[FULL], 4),
                "seconds_of_full": " ".join(f"{ratio:.3f}" for ratio in ratios[rank]),
                "crossover_rank": round(crossover),
            }
        )
        print(rows[-1], flush=True)
    return rows


def median_of(row: dict) -> float:
    """The median round's seconds, full fine-tuning = 1."""
    return statistics.median(map(float, row["seconds_of_full"].split()))


def cells(row: dict) -> str:
    return f"{row['of_full']:.2f}, {median_of(row):.2f}"


def show(rows: list[dict]) -> None:
    print(f"| model | {' | '.join(f'r = {rank}' for rank in RANKS)} | crossover |")
    print("|" + "---|" * (len(RANKS) + 2))
    for name in SIZES:
        own = [row for row in rows if row["model"] == name]
        print(f"| {name} | {' | '.join(map(cells, own))} | {own[0]['crossover_rank']} |")


def draw(rows: list[dict]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for index, name in enumerate(SIZES):
        own = [row for row in rows if row["model"] == name]
        color = f"C{index}"
        axes.plot(RANKS, [row["of_full"] for row in own], "-", color=color, label=name)
        axes.plot(RANKS, [median_of(row) for row in own], "o", color=color)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=4)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set(xlabel="rank", ylabel="of full fine-tuning", ylim=(0.4, 2.1))
    axes.set_title("A step of LoRA: operations (lines) and seconds (dots)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="parameters", fontsize=8)
    figure.savefig(HERE / "results.png", dpi=130)


if __name__ == "__main__":
    main()
