"""Tables, losses compared, the plot, and the files that hold them."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from pathlib import Path

from contest import Rows


def table(study: str, rows: Rows) -> str:
    """Medians of a study, and the ratios of ours to each other contestant of the same precision."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    runs = {name: [row for row in rows if row["contestant"] == name] for name in names}

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in runs[name])

    def ratio(name: str, key: str) -> str:
        asked = name.split()[1]
        ours = {other.split()[1]: other for other in reversed(names) if other.startswith("ours")}
        # An encoder's bf16-mixed is set against our bf16-true.
        base = ours.get(asked) or ours.get(asked.replace("mixed", "true")) or names[0]
        pairs = zip(runs[base], runs[name], strict=True)
        return f"{statistics.median(one[key] / other[key] for one, other in pairs):.2f}"

    if study == "longest":
        lines = ["| contestant | longest row, tokens | peak MiB |", "|---|---|---|"]
        lines += [
            f"| {row['contestant']} | {row['length']} | {row['peak_mib']:.0f} |" for row in rows
        ]
        return "\n".join(lines)
    lines = [
        "| contestant | tokens/s | peak MiB | first step, s | ours to it: tokens/s | memory "
        "| first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [
            f"{median(name, 'tokens_per_second'):.0f}",
            f"{median(name, 'peak_mib'):.0f}",
            f"{median(name, 'first_step'):.1f}",
            *(ratio(name, key) for key in ("tokens_per_second", "peak_mib", "first_step")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_losses(study: str, rows: Rows) -> None:
    """Makes sure that all contestants of a precision compute the same: their losses agree.

    An encoder has dropout, drawn otherwise by each: there the means over all steps are compared.
    """
    by_precision: dict[str, Rows] = {}
    for row in rows:
        by_precision.setdefault(str(row["contestant"]).split()[1], []).append(row)
    for precision, same in by_precision.items():
        tolerance = 2e-3 if precision == "32-true" else 3e-2
        losses = [row["loss"] for row in same]
        if study == "encoder":
            losses = [[statistics.mean(loss)] for loss in losses]
            tolerance = 2e-2
        for values in zip(*losses, strict=True):
            if max(values) - min(values) > tolerance:
                raise SystemExit(f"{study}, {precision}: losses differ, so the work does: {values}")


def plot(rows: Rows, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    labels = {
        "length": "tokens of a row (2,048 tokens a step)",
        "batch_size": "rows a step (256 tokens each)",
        "rank": "rank (8 rows of 256 tokens)",
    }
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        for name in dict.fromkeys(row["contestant"] for row in rows):
            points = [r for r in rows if r["axis"] == axis and r["contestant"] == name]
            x = [row["value"] for row in points]
            y = [1e3 / row["tokens_per_second"] for row in points]
            panel.plot(x, y, marker="o", label=name)
        panel.set(xlabel=label, xscale="log", ylim=(0, None))
        panel.set_xticks(x, [str(value) for value in x], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms a token")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def write(study: str, rows: Rows, folder: Path, notes: list[str]) -> None:
    """Adds a study to the folder's runs.csv, in place of an earlier one, and writes its table."""
    folder.mkdir(exist_ok=True)
    columns = (
        *("study", "round", "contestant", "axis", "value", "length", "seconds"),
        *("tokens_per_second", "peak_mib", "first_step", "loss"),
    )
    path, kept = folder / "runs.csv", []
    if path.exists():
        with path.open(newline="") as handle:
            kept = [row for row in csv.DictReader(handle) if row["study"] != study]
    for row in rows:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        if "loss" in row:
            shown["loss"] = " ".join(f"{loss:.4f}" for loss in row["loss"])
        kept.append(shown)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    if study == "scaling":
        plot(rows, folder / "scaling.png")
        return
    text = "\n".join([*notes, "", table(study, rows), ""])
    (folder / f"{study}.md").write_text(text)
    print(text, flush=True)


def machine() -> str:
    """What the figures were measured on, and with."""
    from importlib.metadata import version

    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    if Path("/proc/cpuinfo").exists():
        found = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cores = f"{os.cpu_count()} cores of an {found[0].partition(': ')[2]}"
    if torch.cuda.is_available():
        cores = torch.cuda.get_device_name()
    names = ("torch", "lightning", "transformers", "peft", "trl")
    return f"{cores}; " + ", ".join(f"{name} {version(name)}" for name in names)
