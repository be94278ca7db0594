r"""Learned against forgotten: the table, results.csv and results.png of a finished `run.sh`.

    python experiments/forgetting/pareto.py FOLDER --targets 1.8 1.5 1.3

A run is a curve: at each validation a loss on the task, and a loss on what the model knew before.
For a target loss counts, of each seed, the run of any learning rate that has forgotten least at the
point where its curve meets the target (linear between validations).
"""

from __future__ import annotations

import argparse
import csv
import statistics
from itertools import pairwise
from pathlib import Path

import matplotlib
from omegaconf import OmegaConf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FIELDS = ("method", "lr", "seed", "step", "loss", "retained")
Curve = list[tuple[float, float]]
"""Loss on the task, and what has been forgotten, at each validation."""


def read(folder: Path) -> list[dict[str, str]]:
    rows = []
    for path in sorted(folder.glob("*/[0-9]*/csv/metrics.csv")):
        config = OmegaConf.load(path.parents[1] / ".hydra" / "config.yaml")
        full = config.lora.method == "full"
        own = {
            "method": "full" if full else f"LoRA, rank {config.lora.rank}",
            "lr": f"{config.optim.lr:g}",
            "seed": str(config.seed),
        }
        with path.open(newline="") as handle:
            seen = set()
            for row in csv.DictReader(handle):
                if row.get("val/retained_loss") and row["val/retained_loss"] not in seen:
                    seen.add(row["val/retained_loss"])  # the last validation is logged twice
                    loss, retained = row.get("val/loss", ""), row["val/retained_loss"]
                    rows.append({**own, "step": row["step"], "loss": loss, "retained": retained})
    return rows


def curves(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], Curve]:
    """By method, rate and seed; the first row of each tells what the base's loss is."""
    found: dict[tuple[str, str, str], Curve] = {}
    base: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = row["method"], row["lr"], row["seed"]
        if not row["loss"]:
            base[key] = float(row["retained"])
            continue
        found.setdefault(key, []).append((float(row["loss"]), float(row["retained"]) - base[key]))
    return found


def forgotten_at(curve: Curve, target: float) -> float | None:
    """What has been forgotten where the loss first comes down to a target; None: it never does."""
    for (loss, forgotten), (next_loss, next_forgotten) in pairwise(curve):
        if next_loss <= target < loss:
            return forgotten + (loss - target) / (loss - next_loss) * (next_forgotten - forgotten)
    return curve[0][1] if curve[0][0] <= target else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", required=True)
    arguments = parser.parse_args()
    rows = read(arguments.folder)
    with (HERE / "results.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    by_run = curves(rows)
    methods = list(dict.fromkeys(key[0] for key in by_run))
    methods.sort(key=lambda name: (name == "full", int(name.split()[-1]) if name != "full" else 0))
    print(f"| method | {' | '.join(f'loss {target:g}' for target in arguments.targets)} |")
    print("|" + "---|" * (len(arguments.targets) + 1))
    for method in methods:
        cells = []
        for target in arguments.targets:
            found = []
            for seed in sorted({key[2] for key in by_run}):
                reached = [
                    (forgotten, key[1])
                    for key, curve in by_run.items()
                    if (key[0], key[2]) == (method, seed)
                    and (forgotten := forgotten_at(curve, target)) is not None
                ]
                found += [min(reached)] if reached else []
            values = [forgotten for forgotten, _ in found]
            rates = "/".join(sorted({rate for _, rate in found}))
            many = f" ({len(values)} seeds)" if 0 < len(values) < 3 else ""
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(
                f"{statistics.mean(values):.2f}{spread}{many}, lr {rates}" if found else ""
            )
        print(f"| {method} | {' | '.join(cells)} |")
    draw(by_run, methods)


def draw(by_run: dict[tuple[str, str, str], Curve], methods: list[str]) -> None:
    figure, axes = plt.subplots(figsize=(6.6, 4), layout="constrained")
    for index, method in enumerate(methods):
        color = "black" if method == "full" else f"C{index}"
        label = method
        for key, curve in by_run.items():
            if key[0] == method:
                losses, forgotten = zip(*curve, strict=True)
                axes.plot(losses, forgotten, ".-", color=color, alpha=0.5, lw=0.8, label=label)
                label = None
    axes.invert_xaxis()
    axes.set(xlabel="validation loss on the task (learned: to the right)", ylabel="forgotten, nats")
    axes.set_title("each curve is a run, from its first validation to its last", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(HERE / "results.png", dpi=130)


if __name__ == "__main__":
    main()
