r"""Learned against forgotten: the table, NAME.csv and NAME.png of a finished `run.sh`.

    python experiments/forgetting/pareto.py FOLDER --name stories260K --targets 1.8 1.5 1.3
    python experiments/forgetting/pareto.py FOLDER --name minilm --metric val/accuracy --targets 0.8

A run is a curve: at each validation a loss or accuracy on the task, and a measure of what the model
knew before: of a language model the loss on texts, of an encoder how far it finds the same texts
alike. For a target counts, of each seed, the run of any learning rate that has forgotten least at
the point where its curve meets the target (linear between validations).
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
FIELDS = ("method", "lr", "seed", "step", "metric", "retained")
RETAINED = ("val/retained_loss", "val/retained_similarity")
Curve = list[tuple[float, float]]
"""The metric of the task, and what has been forgotten, at each validation."""


def read(folder: Path, metric: str) -> list[dict[str, str]]:
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
                retained = next((row[name] for name in RETAINED if row.get(name)), "")
                if retained and retained not in seen:
                    seen.add(retained)  # the last validation is logged twice
                    reached = row.get(metric, "")
                    rows.append(
                        {**own, "step": row["step"], "metric": reached, "retained": retained}
                    )
    return rows


def curves(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], Curve]:
    """By method, rate and seed; the first row of each tells what the base has."""
    found: dict[tuple[str, str, str], Curve] = {}
    base: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = row["method"], row["lr"], row["seed"]
        if not row["metric"]:
            base[key] = float(row["retained"])
            continue
        forgotten = abs(float(row["retained"]) - base[key])
        found.setdefault(key, []).append((float(row["metric"]), forgotten))
    return found


def forgotten_at(curve: Curve, target: float, sign: int) -> float | None:
    """What has been forgotten where the metric first meets a target; None: it never does.

    Args:
        sign: 1 where the metric falls, -1 where it rises.
    """
    for (value, forgotten), (next_value, next_forgotten) in pairwise(curve):
        if sign * next_value <= sign * target < sign * value:
            share = (value - target) / (value - next_value)
            return forgotten + share * (next_forgotten - forgotten)
    return curve[0][1] if sign * curve[0][0] <= sign * target else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="of the base")
    parser.add_argument("--targets", type=float, nargs="+", required=True)
    parser.add_argument("--metric", default="val/loss")
    arguments = parser.parse_args()
    metric = arguments.metric
    sign = 1 if metric.endswith("loss") else -1
    rows = read(arguments.folder, metric)
    with (HERE / f"{arguments.name}.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    by_run = curves(rows)
    methods = list(dict.fromkeys(key[0] for key in by_run))
    methods.sort(key=lambda name: (name == "full", int(name.split()[-1]) if name != "full" else 0))
    heads = [f"{metric.removeprefix('val/')} {target:g}" for target in arguments.targets]
    print(f"| method | {' | '.join(heads)} |")
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
                    and (forgotten := forgotten_at(curve, target, sign)) is not None
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
    draw(by_run, methods, metric, HERE / f"{arguments.name}.png")


def draw(
    by_run: dict[tuple[str, str, str], Curve], methods: list[str], metric: str, path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(6.6, 4), layout="constrained")
    falls = metric.endswith("loss")
    style = ".-" if falls else "o"  # an accuracy goes to and fro: lines would be a tangle
    for index, method in enumerate(methods):
        color = "black" if method == "full" else f"C{index}"
        label = method
        for key, curve in by_run.items():
            if key[0] == method:
                losses, forgotten = zip(*curve, strict=True)
                axes.plot(losses, forgotten, style, color=color, alpha=0.5, lw=0.8, label=label)
                label = None
    if falls:
        axes.invert_xaxis()
        axes.set(ylabel="forgotten, nats per token")
    else:
        axes.set(ylabel="forgotten, 1 - similarity", xlim=(0.5, None))
    axes.set_xlabel(f"{metric} on the task (learned: to the right)")
    title = "each curve is a run, from its first validation to its last"
    axes.set_title(title if falls else "each dot is a validation", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
