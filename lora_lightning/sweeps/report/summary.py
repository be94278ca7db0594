"""Content of a report: rows of its tables, and lines on the best setting and on failures."""

from __future__ import annotations

from typing import Any

from lora_lightning.sweeps.grouping import group_by

from .results import SEED, Run, Setting, Sweep

MEASURED = (
    "trainable_parameters",
    "total_parameters",
    "adapter_bytes",
    "epochs",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_memory_mib",
)
MOST_NAMED = 5
"""Maximum number of settings that a line names."""


def rows_by_run(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a row for each run, with all its known values."""
    return [
        {
            "job": run.job,
            "status": run.status,
            **{key: run.given.get(key, "") for key in sweep.varied},
            **run.adapter,
            "seed": run.config.seed,
            "objective": run.objective,
            **{name: run.result.get(name) for name in (*sweep.metrics, *MEASURED)},
            "config_hash": run.result.get("config_hash"),
            "error": error_of(run),
            "value_at_last_rung": (run.result.get("rungs") or [{}])[-1].get("value"),
            "stopped": run.result.get("stopped"),
            "folder": str(run.folder),
        }
        for run in sweep.runs
    ]


def rows_by_setting(sweep: Sweep) -> list[dict[str, str]]:
    """Return a row of text for each setting, the best first, with mean and deviation over seeds."""
    return [
        {
            "job": setting.jobs,
            **{key: _short(value) for key, value in setting.values.items()},
            "scale": _format(setting.runs[0].adapter["scale"], "{:.4g}"),
            sweep.monitor: _objective(setting),
            **({sweep.headline: spread(setting, sweep.headline)} if sweep.headline else {}),
            "trained": _format(setting.mean("trainable_parameters"), "{:,.0f}"),
            "time": _format(setting.mean("seconds"), "{:,.0f} s"),
            "tokens/s": _format(setting.mean("tokens_per_second"), "{:,.0f}"),
            "memory": _format(setting.mean("peak_memory_mib"), "{:,.0f} MiB"),
            "status": " ".join(dict.fromkeys(run.status for run in setting.runs)),
        }
        for setting in sweep.settings
    ]


def spread(setting: Setting, metric: str) -> str:
    """Return the mean ± deviation over the seeds."""
    mean, deviation = setting.mean(metric), setting.deviation(metric)
    if mean is None:
        return "-"
    return f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}"


def _objective(setting: Setting) -> str:
    """Return the monitored metric, or its values at the last rungs if the setting is unfinished."""
    rungs = [run.result["rungs"][-1] for run in setting.runs if run.result.get("rungs")]
    if setting.mean("objective") is not None or not rungs:
        return spread(setting, "objective")
    return ", ".join(f"{rung['value']:.4f} at step {rung['step']}" for rung in rungs)


def _short(value: str) -> str:
    """Return a sampled number to four digits, and any other value unchanged."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def best_lines(best: Setting, sweep: Sweep) -> list[tuple[str, str]]:
    """Return the lines on the best setting: mean, reliability of the mean, adapter and command."""
    done = [run for run in best.runs if run.objective is not None]
    seeds = f"mean of {len(done)} seeds" if len(done) > 1 else "one seed"
    adapter = str(done[0].folder / "adapter")
    if len(done) > 1:
        adapter += f" (the first of jobs {best.jobs})"
    lines = [
        ("Best", f"{best.name}: {sweep.monitor} {spread(best, 'objective')}, {seeds}"),
        ("Caution", _caution(best, sweep)),
        ("Ties", _ties(sweep)),
        ("Baseline", _baseline(sweep)),
        *(("Warning", line) for line in _warnings(sweep)),
        ("Adapter", adapter),
        ("Command", done[0].command_without(*([SEED] if SEED in sweep.varied else []))),
    ]
    return [(name, text) for name, text in lines if text]


def _caution(best: Setting, sweep: Sweep) -> str:
    """Return a line on what limits the precision of the metric."""
    limits = []
    if sweep.rows:
        limits.append(f"one of {sweep.rows} rows is {100 / sweep.rows:.2g} % of {sweep.monitor}")
    if len(best.runs) > 1:
        limits.append("all seeds use the same rows, so ± does not cover the choice of rows")
    return "; ".join(limits)


def _ties(sweep: Sweep) -> str:
    """Return a line on the settings that are indistinguishable from the best, and the criterion."""
    compared = [one for one in sweep.settings if one.mean("objective") is not None]
    if len(compared) < 2:
        return ""
    ties = sweep.ties()
    both = sweep.is_fraction and sweep.rows
    criterion = f"two standard errors of {'seeds and rows' if both else 'seeds'}"
    if not ties:
        if not both and all(one.deviation("objective") is None for one in compared):
            return "one seed per setting does not show which settings differ: seed=0,1,2"
        return f"none of the other {len(compared) - 1} settings is within {criterion}"
    names = "; ".join(one.name for one in ties[:MOST_NAMED])
    more = f"; and {len(ties) - MOST_NAMED} more" if len(ties) > MOST_NAMED else ""
    settings = "1 setting is" if len(ties) == 1 else f"{len(ties)} settings are"
    return f"{settings} within {criterion}, so not distinguishable from it: {names}{more}"


def _baseline(sweep: Sweep) -> str:
    """Return the monitored metric of a baseline without learning."""
    for run in sweep.runs:
        baseline = run.result.get("baseline", {})
        if sweep.monitor in baseline:
            name = baseline.get("name", "without learning")
            return f"{name}: {sweep.monitor} {baseline[sweep.monitor]:.4f}"
    return ""


def _warnings(sweep: Sweep) -> list[str]:
    """Return the warnings of the runs about their rows, each once."""
    lines = [line for run in sweep.runs for line in run.result.get("warnings", [])]
    return list(dict.fromkeys(lines))


def stopped_lines(sweep: Sweep) -> list[str]:
    """Return lines on when and why successive halving stopped runs, and on the steps it took."""
    ended = all(run.status in ("completed", "failed") for run in sweep.runs)
    if sweep.fraction_of_steps is None or ended:
        return []
    steps = f"{sweep.fraction_of_steps:.0%} of the optimizer steps of all jobs to their end"
    if any(run.status not in ("completed", "stopped", "failed") for run in sweep.runs):
        steps += " so far"
    lines = [f"job {run.job} stopped {run.result.get('stopped')}" for run in sweep.stopped]
    return [*lines, f"Successive halving took {steps}."]


def failures(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the numbers of the failed jobs and their error, each error once."""
    groups = group_by(sweep.failed, error_of)
    return [(" ".join(run.job for run in runs), error) for error, runs in groups.items()]


def error_of(run: Run) -> str:
    """Return the first line of a run's error, or "" if there is none."""
    lines = str(run.result.get("error") or "").strip().splitlines()
    return lines[0].removeprefix("UserError: ") if lines else ""


def made_with(sweep: Sweep) -> str:
    """Return the hardware, precision and versions that the runs report; "" if none does."""
    results = [run.result for run in sweep.runs if run.result.get("versions")]
    kinds = {
        f"{one['device']} {one.get('precision', '')}".strip() for one in results if "device" in one
    }
    versions = [f"{name} {number}" for one in results for name, number in one["versions"].items()]
    return ", ".join([*sorted(filter(None, kinds)), *dict.fromkeys(versions)])
