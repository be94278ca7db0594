r"""Table and results.png of a finished `run.sh`: validation loss by learning rate, rank and alpha.

    python experiments/rank_alpha_lr/plot.py FOLDER

Also writes results.csv, from those that the reports of the two sweeps have made.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FIELDS = ("rank", "alpha", "optim.lr", "seed", "val/loss")
Losses = dict[str, dict[int, dict[float, float]]]
"""Validation loss by the rule for alpha, rank and learning rate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows, losses = [], {}
    for sweep in ("ratio", "same"):
        with (folder / sweep / "results.csv").open(newline="") as handle:
            for row in csv.DictReader(handle):
                rows.append({name: row[name] for name in FIELDS})
                rank, alpha = int(row["rank"]), float(row["alpha"])
                rule = f"{alpha:g}" if sweep == "same" else f"{alpha / rank:g} rank"
                own = losses.setdefault(f"alpha = {rule}", {}).setdefault(rank, {})
                own[float(row["optim.lr"])] = float(row["val/loss"])
    with (HERE / "results.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table(losses)
    plot(losses)


def table(losses: Losses) -> None:
    rates = sorted({rate for of in losses.values() for own in of.values() for rate in own})
    print(f"| | rank | {' | '.join(f'{rate:g}' for rate in rates)} | best |")
    print("|" + "---|" * (len(rates) + 3))
    for rule, of in losses.items():
        for rank, own in sorted(of.items()):
            cells = [f"{own[rate]:.3f}" if rate in own else "" for rate in rates]
            print(f"| {rule} | {rank} | {' | '.join(cells)} | {min(own, key=own.get):g} |")


def plot(losses: Losses) -> None:
    figure, panels = plt.subplots(
        1, len(losses), figsize=(3 * len(losses), 3.4), layout="constrained", sharey=True
    )
    for axes, (rule, of) in zip(panels, losses.items(), strict=True):
        for rank, own in sorted(of.items()):
            axes.plot(*zip(*sorted(own.items()), strict=True), "o-", label=f"rank {rank}")
        axes.set(xscale="log", title=rule, xlabel="learning rate")
        axes.grid(alpha=0.3)
    best = [min(own.values()) for of in losses.values() for own in of.values()]
    panels[0].set(ylabel="val/loss", ylim=(min(best) - 0.05, max(best) + 0.8))
    panels[0].legend(fontsize=8)
    figure.savefig(HERE / "results.png", dpi=130)


if __name__ == "__main__":
    main()
