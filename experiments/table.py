r"""Gathers the result.json files of finished runs into one CSV and a table of mean and deviation.

    python experiments/table.py FOLDER --by lora.method --metric test/accuracy \
        --csv results.csv --plot results.png

FOLDER is searched for runs at any depth. `--by` are config keys, one group per combination of
their values; "sweep" is the name of the sweep's folder, and a group of the config (lora) the choice
in it. The deviation is that of a sample (n - 1). A metric with "before " in front is that of the
untouched model, one with "baseline " that of a rule without learning. Settings of the adapter read
"full" where a run has none.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

from omegaconf import OmegaConf

COLUMNS = (
    "test/accuracy",
    "test/f1",
    "test/loss",
    "test/perplexity",
    "test/rouge1",
    "test/rouge2",
    "test/rougeL",
    "val/accuracy",
    "val/loss",
    "trainable_parameters",
    "total_parameters",
    "adapter_bytes",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_memory_mib",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--by", nargs="+", default=["lora.method"])
    parser.add_argument("--metric", nargs="+", default=["test/accuracy"])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()

    runs = []
    for path in sorted(arguments.folder.rglob("result.json")):
        result = json.loads(path.read_text())
        if result["status"] != "completed":
            print(f"left out ({result['status']}): {path}")
            continue
        group = {key: setting(path.parent, key) for key in arguments.by}
        values = {key: round(result[key], 6) for key in COLUMNS if key in result}
        for kind in ("before", "baseline"):
            named = {f"{kind} {key}": value for key, value in result.get(kind, {}).items()}
            values |= {key: round(named[key], 6) for key in arguments.metric if key in named}
        runs.append({**group, "seed": result["seed"], **values})
    if not runs:
        raise SystemExit(f"no finished run under {arguments.folder}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(runs[0]))
            writer.writeheader()
            writer.writerows(runs)

    print("| " + " | ".join([*arguments.by, "runs", *arguments.metric]) + " |")
    print("|" + "---|" * (len(arguments.by) + 1 + len(arguments.metric)))
    groups: dict[tuple[str, ...], list[dict]] = {}
    for run in runs:
        groups.setdefault(tuple(str(run[key]) for key in arguments.by), []).append(run)
    groups = dict(sorted(groups.items(), key=lambda item: list(map(by_number, item[0]))))
    for group, members in groups.items():
        cells = []
        for metric in arguments.metric:
            values = [float(run[metric]) for run in members]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print("| " + " | ".join([*group, str(len(members)), *cells]) + " |")
    if arguments.plot:
        plot(groups, arguments.metric[0], arguments.plot)


def setting(run: Path, key: str) -> object:
    """A run's setting, its sweep's name, or its choice of a group."""
    if key == "sweep":
        return run.parent.name
    choices = OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra.runtime.choices
    if key in choices:
        return choices[key]
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    if key.startswith("lora.") and config.lora.method == "full":
        return "full"
    return OmegaConf.select(config, key)


def by_number(text: str) -> tuple[float, str]:
    """Sorts numbers by value, before words."""
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def plot(groups: dict[tuple[str, ...], list[dict]], metric: str, path: Path) -> None:
    """Every run as a dot, the mean of its group as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.6 + 1.2 * len(groups), 3.2), layout="constrained")
    for place, members in enumerate(groups.values()):
        values = [float(run[metric]) for run in members]
        axes.plot([place] * len(values), values, "o", color="C0", alpha=0.7)
        axes.hlines(statistics.mean(values), place - 0.2, place + 0.2, color="C1")
    axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel(metric)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
