"""Plots of what a training logged and of what was measured, as PNG files."""

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pose.errors import one_line
from pose.evaluation.task import Estimate, describe, shown
from pose.files import atomic_file
from pose.reporting.metrics_csv import logged_rows
from pose.reporting.tables import RULER, Metrics, common_tasks, series, value_of

POSITION = re.compile(r"position_ppl@(\d+)-(\d+)")
NEEDLE = re.compile(r"(needle|needle_gain)@(\d+)/([\d.]+)")
# Label of the x axis by panel. TITLES has the titles that differ from the family's.
PANELS = {
    "tail_ppl": "window (tokens)",
    "position": "position in the window (tokens)",
    "passkey": "prompt (tokens)",
    "ppl": "window (tokens)",
    "sliding_ppl": "window (tokens)",
    "bits_per_byte": "window (tokens)",
    "needle": "prompt (tokens)",
    "needle_gain": "prompt (tokens)",
    "needle_gain_kept": "prompt (tokens)",
    "ruler": "prompt (tokens)",
}
TITLES = {
    "position": "perplexity by position",
    "ruler": "RULER, mean of its tasks",
    "short_ppl_increase": "increase of perplexity at short lengths",
}
DEFAULT_PANELS = (
    "tail_ppl",
    "position",
    "passkey",
    "needle_gain",
    "needle_gain_kept",
)  # where one of them was measured, else all
TRAINING = {  # panels of a training, by the name of the metric, or by that of CROSS_ENTROPY
    "train/loss_lm": "cross-entropy loss (nats per token)",
    "train/loss_lm_text": "cross-entropy loss of text (nats per token)",
    "train/loss_lm_retrieval": "cross-entropy loss of retrieval (nats per token)",
    "train/loss_kl": "KL at skipped positions (nats per token)",
    "train/loss_short": "distance to the original, plain positions",
    "train/loss_skipped": "distance to the original, skipped positions",
    "train/loss": "training objective (what is minimised)",
    "train/loss_text": "training objective of text",
    "train/loss_retrieval": "training objective of retrieval",
    "train/lr": "learning rate",
    "train/grad_norm": "norm of the gradient",
}
CROSS_ENTROPY = {  # what is logged as minimised, and what it is where an objective has no parts
    "train/loss": "train/loss_lm",
    "train/loss_text": "train/loss_lm_text",
    "train/loss_retrieval": "train/loss_lm_retrieval",
}
NOISY = (*(name for name in TRAINING if name.startswith("train/loss")), "train/grad_norm")  # smoothed over SMOOTHING
SMOOTHING = 0.05, 2.5  # standard deviation of the kernel: a share of all steps, and at least so many points
# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dvp*"
HEATMAP = "cividis"  # grows evenly in brightness, and looks alike to the colour-blind
STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten
LABEL_SPACE = 0.13  # of an axis, that the label of a tick needs


Points = list[tuple[int, float]]  # optimizer step and value


def training_curves(rows: Sequence[Mapping[str, str]]) -> tuple[dict[str, Points], dict[str, dict[int | None, Points]]]:
    """What a training logged, from the rows of its metrics.csv.

    The language model's loss is train/loss_lm of every objective; that of self_distill is at plain positions, those of
    the others at the sampler's. Losses of text and of retrieval are given where both were logged.

    Returns:
        The curves of TRAINING by metric, and what `watch` measured by family and length (None where it has none).
    """
    train: dict[str, Points] = {}
    watched: dict[str, dict[int | None, Points]] = {}
    for row in rows:
        for name, text in row.items():
            point = (int(row["step"]) + 1, float(text))
            if "train/loss_lm" not in row:
                name = CROSS_ENTROPY.get(name, name)
            family, _, length = name.removeprefix("val/").partition("@")
            if name in TRAINING:
                train.setdefault(name, []).append(point)
            elif name.startswith("val/") and family != "bits_per_byte" and (not length or length.isdecimal()):
                watched.setdefault(family, {}).setdefault(int(length) if length else None, []).append(point)
    for loss, *by_kind in (CROSS_ENTROPY.keys(), CROSS_ENTROPY.values()):
        if loss in train and not train.keys() >= set(by_kind):  # the same again
            for name in by_kind:
                train.pop(name, None)
    order = [name for name in PANELS if name in watched] + [name for name in watched if name not in PANELS]
    return {name: train[name] for name in TRAINING if name in train}, {name: watched[name] for name in order}


def plot_training(csv_file: Path, png: Path):
    """Over the optimizer steps, from Lightning's metrics.csv: losses, what `watch` measured, learning rate, gradients.

    A loss is drawn faintly as it was logged, and smoothed. Without a loss a file of before is removed.
    """
    train, watched = training_curves(logged_rows(csv_file))
    losses = [name for name in train if name.startswith("train/loss")]
    if not losses:
        png.unlink(missing_ok=True)
        return
    others = [name for name in train if name not in losses]
    figure, panels = _panels(len(losses) + len(watched) + len(others))
    for name, axes in zip([*losses, *watched, *others], panels, strict=True):
        axes.set(title=TRAINING.get(name) or title_of(name), xlabel="optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
        if name in train:
            _plot_noisy(axes, train[name], smooth=name in NOISY)
            continue
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(watched[name])))
        lines = sorted(watched[name].items(), key=lambda item: item[0] or 0)
        for i, ((tokens, points), color) in enumerate(zip(lines, shades, strict=True)):
            label = "" if tokens is None else f"at {tokens:,} tokens"
            axes.plot(*zip(*points, strict=True), marker=_marker(i), markersize=3, label=label, color=color)
        if any(tokens is not None for tokens, _ in lines):
            axes.legend(fontsize="small")
        _scale_values(axes, name, [value for _, points in lines for _, value in points])
    save_figure(figure, png)


def plot_measured(
    results: Mapping[str, Metrics],
    folder: Path,
    window: int | None = None,
    target: int | None = None,
    panels: Sequence[str] = DEFAULT_PANELS,
):
    """All plots of what was measured: evaluation.png, and heatmaps where there are any.

    These are needle.png, needle_gain.png and ruler.png. Files of an earlier report that this one has no data for are
    removed.

    Args:
        results: metrics or estimates by model.
        folder: to write to.
        window, target: as of `plot_results`.
        panels: of evaluation.png; where none of them was measured it has all that were.
    """
    has_any = any(points_of(metrics, panel) for metrics in results.values() for panel in panels)
    plot_results(results, folder / "evaluation.png", window, panels if has_any else tuple(PANELS), target)
    plot_needle(results, folder / "needle.png")
    plot_needle(results, folder / "needle_gain.png", "needle_gain")
    plot_ruler(results, folder / "ruler.png")


def plot_results(
    results: Mapping[str, Metrics],
    png: Path,
    window: int | None = None,
    panels: Sequence[str] = DEFAULT_PANELS,
    target: int | None = None,
):
    """Metrics by length or by position, a panel each; a line for each model, and its 95 % interval where there is one.

    Args:
        results: metrics or estimates by model; the names are those of the legend.
        png: file to write.
        window: of the model before it was extended, in tokens; marked by a dotted line when given.
        panels: of PANELS; those without data are left out.
        target: the window that was trained for, in tokens; marked by a dashed line when given.
    """
    tasks = common_tasks(results.values())
    lines = {name: {model: points_of(metrics, name, tasks) for model, metrics in results.items()} for name in panels}
    drawn = [name for name in panels if any(lines[name].values())]
    if not drawn:
        png.unlink(missing_ok=True)
        return
    figure, grid = _panels(len(drawn))
    entries: dict[str, Line2D] = {}
    for panel, axes in zip(drawn, grid, strict=True):
        lengths = sorted({n for points in lines[panel].values() for n in points})
        axes.set(title=title_of(panel), xlabel=PANELS[panel])
        for i, (model, points) in enumerate(lines[panel].items()):
            if points:
                entries.setdefault(model, _plot_estimates(axes, model, points, i))
        for mark, label, style in ((window, "window", ":"), (target, "target", "--")):
            if mark and (mark != window or label == "window"):
                name = f"{label} of {mark:,} tokens"
                entries.setdefault(name, axes.axvline(mark, color="grey", linestyle=style, linewidth=1, label=name))
        if panel == "position":
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        else:
            _label_lengths(axes, lengths)
        values = [value_of(value) for points in lines[panel].values() for value in points.values()]
        _scale_values(axes, panel, values)
    order = [*(model for model in results if model in entries), *(name for name in entries if name not in results)]
    figure.legend(
        [entries[name] for name in order],
        [label_of(name) for name in order],
        loc="outside lower center",
        ncols=min(2 * len(drawn), len(order)),
        fontsize="small",
    )
    save_figure(figure, png)


def plot_needle(results: Mapping[str, Metrics], png: Path, family: str = "needle"):
    """Heatmaps of needle@N/D, one a model: length across, depth down, the share found and its number in each cell.

    Args:
        results: metrics or estimates by model.
        png: file to write.
        family: needle, or needle_gain for the nats that are gained.
    """
    found = {model: cells_of(metrics, family) for model, metrics in results.items()}
    _plot_heatmaps(found, png, family, "prompt (tokens)", "depth of the needle")


def plot_ruler(results: Mapping[str, Metrics], png: Path):
    """Heatmaps of ruler/TASK@N, one a model: length across, tasks down, the score and its number in each cell."""
    found = {model: cells_of(metrics, "ruler") for model, metrics in results.items()}
    _plot_heatmaps(found, png, "ruler", "prompt (tokens)", "")


def cells_of(metrics: Metrics, family: str) -> dict[tuple[float | str, int], float | Estimate]:
    """Cells of a heatmap of one model, by (depth, length) of needle and needle_gain, by (task, length) of ruler."""
    if family == "ruler":
        tasks = ((RULER.fullmatch(name), value) for name, value in metrics.items())
        return {(m[1], int(m[2])): value for m, value in tasks if m}
    needles = ((NEEDLE.fullmatch(name), value) for name, value in metrics.items())
    return {(float(m[3]), int(m[2])): value for m, value in needles if m and m[1] == family}


def rows_of(heatmaps: Iterable[Mapping[tuple[float | str, int], Any]]) -> list[float | str]:
    """The rows of several heatmaps: depths ascend, tasks stay in the order they come in."""
    rows = list(dict.fromkeys(row for cells in heatmaps for row, _ in cells))
    return sorted(rows) if all(isinstance(row, float) for row in rows) else rows


def top_of(family: str, values: Iterable[float]) -> float:
    """Where the colours of heatmaps end: at 1 for shares, else at the largest finite value, or at 1e-3."""
    if describe(family).is_share:
        return 1.0
    return max((value for value in values if 1e-3 < value < math.inf), default=1e-3)


def save_figure(figure: Figure, png: Path):
    """Writes a figure in one step; its folder is made."""
    png.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), atomic_file(png, "wb") as file:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names in scripts that the font lacks
        figure.savefig(file, format="png", dpi=120)


def label_of(name: str) -> str:
    """A name, or the end of a long one, as matplotlib shows it: no mathematics, and no underscore, which it hides."""
    name = one_line(name)
    name = (name if len(name) <= 40 else "..." + name[-37:]).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _panels(num: int) -> tuple[Figure, list]:
    """A figure with num panels, and their axes."""
    columns = min(num, 3)
    rows = math.ceil(num / columns)
    figure = Figure(figsize=(4.6 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[num:]:
        axes.remove()
    return figure, list(grid.flat[:num])


def _plot_noisy(axes, points: Sequence[tuple[int, float]], smooth: bool):
    """Values by step; where they are to be smoothed, as a line over what was logged."""
    steps, values = np.array(points, dtype=np.float64).T
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not smooth or len(steps) < 5:
        axes.plot(steps, values, marker=_marker(0) if len(steps) < 30 else None, markersize=3, color=COLORS[0])
        return
    axes.plot(steps, values, color=COLORS[0], alpha=0.3, linewidth=1, label="as logged")
    axes.plot(*smoothed(steps, values), color=COLORS[0], linewidth=2, label="smoothed")
    axes.legend(fontsize="small")


def smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A noisy curve by a Gaussian kernel of the width SMOOTHING: 200 steps, and the values there."""
    at = np.linspace(steps[0], steps[-1], 200)
    share, num_points = SMOOTHING
    width = max(share, num_points / len(steps)) * max(np.ptp(steps), 1)
    weights = np.exp(-0.5 * ((at[:, None] - steps) / width) ** 2)
    return at, weights @ values / weights.sum(1)


def _plot_estimates(axes, model: str, points: Mapping[float, float | Estimate], i: int) -> Line2D:
    """A line through a model's values, and their intervals: a band, or a bar where it would have no width."""
    style = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--")[i // len(COLORS) % 2], "marker": _marker(i)}
    values = [value_of(value) for value in points.values()]
    (line,) = axes.plot(list(points), values, markersize=4, label=model, **style)
    bounds = [(n, e.low, e.high) for n, e in points.items() if isinstance(e, Estimate) and e.low is not None]
    if len(bounds) > 1:
        axes.fill_between(*zip(*bounds, strict=True), alpha=0.15, color=style["color"], linewidth=0)
    elif bounds:
        axes.vlines(*zip(*bounds, strict=True), color=style["color"], linewidth=1)
    return line


def _label_lengths(axes, lengths: Sequence[float]):
    """A logarithmic axis of lengths, with a tick for each, and labels for as many as have room: the ends first."""
    axes.set_xscale("log", base=2)
    places = np.log2(lengths)
    space = LABEL_SPACE * max(np.ptp(places), 1e-9)
    labelled: list[int] = []
    for i in [0, len(lengths) - 1, *range(1, len(lengths) - 1)]:
        if all(abs(places[i] - places[j]) >= space for j in labelled) or i == 0:
            labelled.append(i)
    axes.set_xticks(lengths, [f"{n:,.0f}" if i in labelled else "" for i, n in enumerate(lengths)])
    axes.xaxis.set_minor_locator(NullLocator())


def _scale_values(axes, name: str, values: Sequence[float]):
    """The vertical axis: shares from 0 to 1, perplexities by their logarithm, with few labels."""
    if describe(name).is_share:
        axes.set_ylim(-0.05, 1.05)
        axes.yaxis.set_major_formatter("{x:.0%}")
        return
    if name == "short_ppl_increase":
        axes.yaxis.set_major_formatter("{x:+.0%}")
        return
    finite = [value for value in values if 0 < value < math.inf]
    if not finite or ("ppl" not in name and name != "position"):
        return
    axes.set_yscale("log")
    decades = math.log10(max(finite) / min(finite))
    if decades < 0.7:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))


def _plot_heatmaps(
    found: Mapping[str, Mapping[tuple, float | Estimate]], png: Path, family: str, xlabel: str, ylabel: str
):
    """Cells by (row, column); rows in the order of `rows_of`; models without any left out.

    Colours are of shares from 0 to 1, or of numbers from 0 to the largest of all models: those below have the darkest.
    """
    found = {model: cells for model, cells in found.items() if cells}
    if not found:
        png.unlink(missing_ok=True)
        return
    is_share = describe(family).is_share
    top = top_of(family, (value_of(value) for cells in found.values() for value in cells.values()))
    rows = rows_of(found.values())
    columns = sorted({column for cells in found.values() for _, column in cells})
    across = min(len(found), 3)
    down = math.ceil(len(found) / across)
    size = (across * max(3.6, 1.8 + 0.75 * len(columns)), down * max(3.0, 1.4 + 0.45 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.remove()
    for (model, cells), axes in zip(found.items(), grid.flat, strict=False):
        values = np.array(
            [[value_of(cells[row, column]) if (row, column) in cells else np.nan for column in columns] for row in rows]
        )
        image = axes.imshow(values, vmin=0, vmax=top, cmap=HEATMAP, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                cell = cells[rows[y], columns[x]]
                text = shown(family, value) + (f"\nn={cell.num}" if isinstance(cell, Estimate) else "")
                dark = np.dot(image.cmap(image.norm(value))[:3], (0.299, 0.587, 0.114)) < 0.5
                axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
        axes.set_xticks(range(len(columns)), [f"{column:,}" for column in columns], fontsize="small")
        labels = [f"{100 * row:.3g}%" if isinstance(row, float) else label_of(row) for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize="small")
        axes.set_title(label_of(model), fontsize="medium")
        axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=list(grid.flat[: len(found)]), shrink=0.8, format="{x:.0%}" if is_share else "{x:g}")
    save_figure(figure, png)


def points_of(metrics: Metrics, panel: str, tasks: Collection[str] | None = None) -> dict[float, float | Estimate]:
    """What a panel of PANELS shows of one model, by length, or by the middle of the bin; tasks as of `series`."""
    if panel == "position":
        bins = ((POSITION.fullmatch(name), value) for name, value in metrics.items())
        by_middle = {(int(m[1]) + int(m[2])) / 2: value for m, value in bins if m}
        return dict(sorted(by_middle.items()))
    return {float(n): value for n, value in series(metrics, panel, tasks).items()}


def last_position(metrics: Metrics) -> int:
    """Where the last bin of perplexity by position ends; 0 where there is none."""
    return max((int(found[2]) for name in metrics if (found := POSITION.fullmatch(name))), default=0)


def title_of(family: str) -> str:
    """Of a panel: what is measured, and its unit."""
    metric = describe(family)
    return TITLES.get(family) or label_of(metric.title) + (" accuracy" if metric.is_share else "")


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]
