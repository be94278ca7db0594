"""The plots of a report, as SVG embedded in the page."""

from __future__ import annotations

import io
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from .results import Setting, Sweep

ALPHAS = ("lora.alpha", "lora.alpha_ratio", "lora.scale")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, small and searchable
    "svg.hashsalt": "lora_lightning",
    "font.family": "sans-serif",
    "text.parse_math": False,  # a dollar in a pattern of lora.targets is literal
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
BLUE, GREY, RED = "#2563a8", "#9aa3ad", "#c0392b"


def plots(sweep: Sweep) -> list[tuple[str, str, str]]:
    """Return title, explanation and SVG of each plot for which the sweep has data."""
    with rc_context(STYLE):
        drawn = [draw(sweep) for draw in (heatmap, pareto, scales, curves)]
        return [(title, text, _svg(figure)) for title, text, figure in filter(None, drawn)]


def heatmap(sweep: Sweep) -> tuple[str, str, Figure] | None:
    """Plot the metric over two varied settings: rank and alpha if they vary."""
    keys = [key for key in sweep.varied if key != "seed"]
    preferred = [key for key in ("lora.rank", *ALPHAS) if key in keys]
    chosen = (preferred + [key for key in keys if key not in preferred])[:2]
    scored = _scored(sweep)
    if len(chosen) < 2 or not scored:
        return None
    x_key, y_key = chosen
    xs = sorted({setting.values[x_key] for setting in scored}, key=_order)
    ys = sorted({setting.values[y_key] for setting in scored}, key=_order)
    cells: dict[tuple[int, int], float] = {}
    for setting in reversed(scored):  # the best setting comes last and overwrites others
        place = ys.index(setting.values[y_key]), xs.index(setting.values[x_key])
        cells[place] = setting.mean("objective") or 0.0
    grid = [[cells.get((y, x), float("nan")) for x in range(len(xs))] for y in range(len(ys))]
    figure = Figure(figsize=(1.8 + 1.0 * len(xs), 1.4 + 0.6 * len(ys)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="viridis" if sweep.sign > 0 else "viridis_r", aspect="auto")
    middle = sum(cells.values()) / len(cells)
    for (y, x), value in cells.items():
        bright = sweep.sign * value > sweep.sign * middle
        axes.text(x, y, f"{value:.4f}", ha="center", va="center", color="k" if bright else "w")
    axes.set_xticks(range(len(xs)), xs)
    axes.set_yticks(range(len(ys)), ys)
    axes.set_xlabel(x_key)
    axes.set_ylabel(y_key)
    axes.grid(visible=False)
    figure.colorbar(image, label=sweep.monitor)
    others = [key for key in keys if key not in chosen]
    text = "Mean over the seeds." if "seed" in sweep.varied else ""
    if others:
        text += f" Each cell has the best value over {', '.join(others)}."
    return f"{sweep.monitor} over {x_key} and {y_key}", text.strip(), figure


def pareto(sweep: Sweep) -> tuple[str, str, Figure] | None:
    """Plot the metric against the trainable parameters, with the Pareto front."""
    points = [
        (setting.mean("trainable_parameters"), setting.mean("objective"), setting)
        for setting in _scored(sweep)
    ]
    known = [
        (size, value, setting) for size, value, setting in points if size and value is not None
    ]
    if len(known) < 2:
        return None
    front = pareto_front([(size, sweep.sign * value) for size, value, _ in known])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for index, (size, value, setting) in enumerate(known):
        deviation = setting.deviation("objective")
        color = BLUE if index in front else GREY
        axes.errorbar(size, value, yerr=deviation, fmt="o", color=color, capsize=3)
    line = sorted((known[index][0], known[index][1]) for index in front)
    axes.plot([size for size, _ in line], [value for _, value in line], color=BLUE, lw=1)
    _log_axis(axes, [size for size, _, _ in known], "{:,.0f}")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(sweep.monitor)
    axes.margins(x=0.15, y=0.15)
    labels = {
        index: " ".join(f"{key.split('.')[-1]}={text}" for key, text in setting.values.items())
        for index, (_, _, setting) in enumerate(known)  # the best first
        if index in front
    }
    text = (
        "Blue: no other setting has fewer parameters and a better value. Bars: deviation of seeds."
    )
    if not _add_labels(axes, [(size, value) for size, value, _ in known], labels):
        text += " A setting has no label where it would overlap another."
    return f"{sweep.monitor} against the trainable parameters", text, figure


def _add_labels(axes: Axes, points: list[tuple[float, float]], labels: dict[int, str]) -> bool:
    """Label some of the points where there is room; return whether every label has room.

    Upper left comes first: no point is there if the labeled points are a Pareto front.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # sets the size of the axes
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(points)]
    complete = True
    for index, text in labels.items():
        for x, y in ((-5, 4), (5, 4), (5, -4), (-5, -4)):
            label = axes.annotate(
                text,
                points[index],
                xytext=(x, y),
                textcoords="offset points",
                fontsize=8,
                ha="left" if x > 0 else "right",
                va="bottom" if y > 0 else "top",
            )
            box = label.get_window_extent(renderer)
            fits = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if fits and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()
        else:
            complete = False
    return complete


def pareto_front(points: list[tuple[float, float]]) -> set[int]:
    """Return the indices of the (size, value) points that no other point beats.

    A point beats another if it is no larger and has a better value, or is smaller and no worse.
    """
    return {
        index
        for index, (size, value) in enumerate(points)
        if not any(
            (other_size <= size and other > value) or (other_size < size and other >= value)
            for other_size, other in points
        )
    }


def scales(sweep: Sweep) -> tuple[str, str, Figure] | None:
    """Plot the metric against the effective scale of the update."""
    runs = [run for run in sweep.runs if run.objective is not None and run.lora is not None]
    ranks = sorted({run.adapter["rank"] for run in runs})
    if len({run.adapter["scale"] for run in runs}) < 2:
        return None
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for rank in ranks:
        values: dict[float, list[float]] = {}
        for run in runs:
            if run.adapter["rank"] == rank:
                values.setdefault(run.adapter["scale"], []).append(run.objective or 0.0)
        means = sorted((scale, fmean(objectives)) for scale, objectives in values.items())
        (line,) = axes.plot(*zip(*means, strict=True), lw=1, label=f"rank {rank}")
        points = [(scale, value) for scale, objectives in values.items() for value in objectives]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color())
    _log_axis(axes, [run.adapter["scale"] for run in runs], "{:.3g}")
    axes.set_xlabel("scale of the update: alpha / rank, with rsLoRA alpha / sqrt(rank)")
    axes.set_ylabel(sweep.monitor)
    axes.legend(fontsize=8)
    return (
        f"{sweep.monitor} against the scale",
        "A point for each run, a line through the means.",
        figure,
    )


def curves(sweep: Sweep) -> tuple[str, str, Figure] | None:
    """Plot the metric at each validation of each run."""
    runs = [run for run in sweep.runs if run.curve]
    if not runs:
        return None
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    best = [] if sweep.best is None else sweep.best.runs
    for run in runs:
        steps, values = zip(*run.curve, strict=True)
        color = BLUE if run in best else RED if run.status == "failed" else GREY
        on_top = 3 if run in best else 2
        axes.plot(steps, values, color=color, marker=".", lw=2 if run in best else 1, zorder=on_top)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(sweep.monitor)
    text = "A line for each run. Blue: the best setting." if best else "A line for each run."
    return f"{sweep.monitor} during training", text, figure


def _scored(sweep: Sweep) -> list[Setting]:
    return [setting for setting in sweep.settings if setting.mean("objective") is not None]


def _log_axis(axes: Axes, values: list[float], form: str) -> None:
    """Make the x axis logarithmic, with ticks at the values if only a few are distinct."""
    axes.set_xscale("log")
    distinct = sorted(set(values))
    axes.minorticks_off()
    if len(distinct) <= 8:
        axes.set_xticks(distinct, [form.format(value) for value in distinct])
    else:  # the default labels are formulas, which STYLE turns off
        axes.xaxis.set_major_formatter(lambda value, _: form.format(value))


def _order(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    metadata: dict[str, Any] = {"Date": None}  # the same runs give the same bytes
    figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
