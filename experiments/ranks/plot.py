"""Draws results.png from the two tables beside it: validation loss against rank."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
RANKS = [1, 2, 4, 8, 16, 32, 64]


def main() -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, name in zip(panels, ("dialogsum", "e2e"), strict=True):
        with (FOLDER / f"{name}.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        lora = {(row["lora.rank"], float(row["optim.lr"])): float(row["val/loss"]) for row in rows}
        for rate in (3e-3, 1e-2):
            losses = [lora[str(rank), rate] for rank in RANKS]
            axes.plot(RANKS, losses, "o-", label=f"LoRA, lr {rate:g}")
        full = min(loss for (rank, _), loss in lora.items() if rank == "full")
        axes.axhline(full, color="black", linestyle="--", label="full fine-tuning, best of 3 rates")
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axes.set(title=name, xlabel="rank", ylabel="val/loss")
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(FOLDER / "results.png", dpi=130)


if __name__ == "__main__":
    main()
