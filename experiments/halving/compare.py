r"""What successive halving found, and for how many steps, against the exhaustive search.

    python experiments/halving/compare.py FOLDER --csv results.csv

FOLDER holds the sweeps halving-SEED and exhaustive-SEED. What halving chose is judged by what the
exhaustive search measured of the same configuration: they are the same runs.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    lines = [
        "| seed | halving's best | exhaustive best | gap, points | steps | places of those kept |"
    ]
    lines.append("|---|---|---|---|---|---|")
    kept = []
    for path in sorted(arguments.folder.glob("halving-*")):
        seed = path.name.rpartition("-")[2]
        halved, whole = rows(path), rows(arguments.folder / f"exhaustive-{seed}")
        ended = {job: row for job, row in halved.items() if row["status"] == "completed"}
        for job, row in ended.items():
            if abs(float(row["objective"]) - float(whole[job]["objective"])) > 1e-6:
                raise SystemExit(f"job {job} of {path} is not the run of the exhaustive search")
        chosen = max(ended, key=lambda job: float(ended[job]["objective"]))
        order = sorted(whole, key=lambda job: -float(whole[job]["objective"]))
        found, best = (float(whole[job]["objective"]) for job in (chosen, order[0]))
        steps = [sum(int(row["steps"]) for row in all.values()) for all in (halved, whole)]
        places = " ".join(str(order.index(job) + 1) for job in ended)
        lines.append(
            f"| {seed} | {found:.4f} (rank {whole[chosen]['rank']}, lr {whole[chosen]['optim.lr']})"
            f" | {best:.4f} (rank {whole[order[0]]['rank']}, lr {whole[order[0]]['optim.lr']})"
            f" | {100 * (best - found):.2f} | {steps[0] / steps[1]:.1%} | {places} |"
        )
        kept += [
            {"seed": seed, "search": search, **{key: row[key] for key in COLUMNS}}
            for search, all in (("halving", halved), ("exhaustive", whole))
            for row in all.values()
        ]
    print("\n".join(lines))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(kept[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)


COLUMNS = ("job", "status", "lora.rank", "optim.lr", "steps", "objective", "stopped")


def rows(sweep: Path) -> dict[str, dict[str, str]]:
    """A sweep's results.csv by job."""
    with (sweep / "results.csv").open(newline="") as handle:
        return {row["job"]: row for row in csv.DictReader(handle)}


if __name__ == "__main__":
    main()
