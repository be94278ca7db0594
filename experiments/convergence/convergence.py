r"""Steps and seconds to a target: the table, CSV and plot of a finished `run.sh`.

    python experiments/convergence/convergence.py sst2 FOLDER --targets 0.83 0.85
    python experiments/convergence/convergence.py e2e FOLDER --targets 2 1.7 1.5

The task's metric is read of each validation; a target is reached where it first meets it, between
two validations in a straight line. Seconds are those of the training steps alone, from the rows per
second that the runs log. Of each method the rate counts that reaches a target in the fewest steps,
over the seeds; a rate by which a seed never reaches it counts where no other does better.
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
METRICS = {"sst2": "val/accuracy", "e2e": "val/loss"}
RETAINED = ("val/retained_loss", "val/retained_similarity")
FIELDS = ("method", "lr", "seed", "step", "seconds", "metric", "retained")
ROWS_PER_SECOND = "throughput/rows_per_second"
Run = list[tuple[int, float, float]]
"""Step, seconds and metric at each validation."""


def read(folder: Path, metric: str) -> list[dict[str, str]]:
    """A row for each validation of each run."""
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
            lines = list(csv.DictReader(handle))
        spent = seconds_by_step(lines, config.data.batch_size)
        last = ""
        for line in lines:
            retained = next((line[name] for name in RETAINED if line.get(name)), "")
            step = int(line["step"])
            if retained and retained != last:  # the last validation is logged twice
                last = retained
                took = f"{interpolated(spent, step):.2f}"
                value = line.get(metric, "")
                rows.append(
                    {**own, "step": step, "seconds": took, "metric": value, "retained": retained}
                )
    return rows


def seconds_by_step(lines: list[dict[str, str]], batch_size: int) -> list[tuple[int, float]]:
    """Seconds of training alone up to each logged step."""
    found = [(0, 0.0)]
    for line in lines:
        if line.get(ROWS_PER_SECOND):
            step, (before, spent) = int(line["step"]), found[-1]
            took = (step - before) * batch_size / float(line[ROWS_PER_SECOND])
            found.append((step, spent + took))
    return found


def interpolated(points: list[tuple[int, float]], place: float) -> float:
    for (left, low), (right, high) in pairwise(points):
        if left <= place <= right:
            return low + (place - left) / (right - left) * (high - low)
    return points[-1][1]


def reached(run: Run, target: float, falling: bool) -> tuple[float, float] | None:
    """Steps and seconds at which a run first meets a target."""
    sign = -1 if falling else 1
    for (left, before, worse), (right, after, better) in pairwise(run):
        if sign * better >= sign * target:
            share = (target - worse) / (better - worse) if better != worse else 1.0
            share = min(1.0, max(0.0, share))
            return left + share * (right - left), before + share * (after - before)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=METRICS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", required=True)
    arguments = parser.parse_args()
    metric = METRICS[arguments.task]
    rows = read(arguments.folder, metric)
    with (HERE / f"{arguments.task}.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    runs: dict[tuple[str, str, str], Run] = {}
    for row in rows:
        if row["metric"]:
            value = int(row["step"]), float(row["seconds"]), float(row["metric"])
            runs.setdefault((row["method"], row["lr"], row["seed"]), []).append(value)
    show(runs, arguments.targets, falling=metric == "val/loss")
    draw(runs, arguments.targets, arguments.task)


def show(runs: dict[tuple[str, str, str], Run], targets: list[float], falling: bool) -> None:
    print("| method | target | rate | seeds that reach it | steps | seconds |")
    print("|---|---|---|---|---|---|")
    for target in targets:
        for method in dict.fromkeys(key[0] for key in runs):
            by_rate: dict[str, list[tuple[float, float]]] = {}
            for (name, rate, _), run in runs.items():
                if name == method:
                    met = reached(run, target, falling)
                    by_rate.setdefault(rate, []).extend([met] if met else [])
            met_by_rate = {rate: met for rate, met in by_rate.items() if met}
            if not met_by_rate:
                print(f"| {method} | {target:g} | | 0 | | |")
                continue
            best = min(
                met_by_rate,
                key=lambda rate: (
                    -len(met_by_rate[rate]),
                    statistics.mean(step for step, _ in met_by_rate[rate]),
                ),
            )
            met = met_by_rate[best]
            cells = [
                f"{statistics.mean(values):.0f}"
                + (f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else "")
                for values in zip(*met, strict=True)
            ]
            print(f"| {method} | {target:g} | {best} | {len(met)} | {cells[0]} | {cells[1]} |")


def draw(runs: dict[tuple[str, str, str], Run], targets: list[float], task: str) -> None:
    metric = METRICS[task]
    methods = list(dict.fromkeys(key[0] for key in runs))
    figure, panels = plt.subplots(1, len(methods), figsize=(9, 3.6), layout="constrained")
    for axes, method in zip(panels, methods, strict=True):
        rates = list(dict.fromkeys(rate for name, rate, _ in runs if name == method))
        for color, rate in enumerate(rates):
            own = [run for (name, of, _), run in runs.items() if (name, of) == (method, rate)]
            for index, run in enumerate(own):
                seconds, values = [at[1] for at in run], [at[2] for at in run]
                label = f"lr {rate}" if index == 0 else None
                axes.plot(seconds, values, ".-", color=f"C{color}", lw=0.9, alpha=0.7, label=label)
        for target in targets:
            axes.axhline(target, color="black", lw=0.7, ls=":")
        axes.set(title=method, xlabel="seconds of training", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    widths = [axes.get_xlim()[1] for axes in panels]
    for axes in panels:
        axes.set(xlim=(0, max(widths)), ylim=(min(limits), min(max(limits), 4)))
    figure.savefig(HERE / f"{task}.png", dpi=130)


if __name__ == "__main__":
    main()
