"""Plots of what a training logged and of what was measured, as PNG files."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from pose.evaluation.task import Estimate
from pose.reporting.tables import SHARES, Metrics, lengths_of, value_of

POSITION = re.compile(r"position_ppl@(\d+)-(\d+)")
NEEDLE = re.compile(r"needle@(\d+)/([\d.]+)")
RULER = re.compile(r"ruler/(.+)@(\d+)")
PANELS = {
    "tail_ppl": ("perplexity of the last tokens", "window (tokens)"),
    "position": ("perplexity by position", "position in the window (tokens)"),
    "passkey": ("passkey accuracy", "prompt (tokens)"),
    "ppl": ("perplexity", "window (tokens)"),
    "sliding_ppl": ("sliding-window perplexity", "window (tokens)"),
    "bits_per_byte": ("bits per byte", "window (tokens)"),
    "needle": ("needle accuracy", "prompt (tokens)"),
    "ruler": ("RULER, mean of its tasks", "prompt (tokens)"),
}
DEFAULT_PANELS = ("tail_ppl", "position", "passkey")


def plot_training(csv_file: Path, png: Path):
    """Over the optimizer steps, from Lightning's metrics.csv: the loss, and in further panels what `watch` measured."""
    if not csv_file.is_file():  # nothing was logged: a run that was complete
        return
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}}  # by panel and line: step and value
    with open(csv_file) as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                panel, _, line = name.removeprefix("val/").partition("@")
                if name == "train/loss":
                    panel = "loss"
                elif not name.startswith("val/") or panel in ("position_ppl", "bits_per_byte") or "/" in line:
                    continue
                if value:
                    curves.setdefault(panel, {}).setdefault(line, []).append((int(row["step"]) + 1, float(value)))
    if not curves["loss"]:
        return
    titles = {"loss": "training loss (nats per token)", "short_ppl_increase": "increase of perplexity at short lengths"}
    titles |= {name: title for name, (title, _) in PANELS.items()}
    figure, panels = _panels(len(curves))
    for (panel, lines), axes in zip(curves.items(), panels, strict=True):
        for line, points in lines.items():
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=f"at {line} tokens")
        axes.set(xlabel="optimizer step", title=titles.get(panel, panel))
        if SHARES.fullmatch(panel):
            axes.set_ylim(-0.05, 1.05)
        if any(lines):
            axes.legend(fontsize="small")
    save_figure(figure, png)


def plot_results(
    results: Mapping[str, Metrics], png: Path, window: int | None = None, panels: Sequence[str] = DEFAULT_PANELS
):
    """Metrics by length or by position, a panel each; a line for each model, and its 95 % interval where there is one.

    Args:
        results: metrics or estimates by model.
        png: file to write.
        window: tokens; marked by a dotted line when given.
        panels: of PANELS; those without data are left out.
    """
    series = {name: {model: _series(metrics, name) for model, metrics in results.items()} for name in panels}
    shown = [name for name in panels if any(series[name].values())]
    if not shown:
        return
    figure, grid = _panels(len(shown))
    for name, axes in zip(shown, grid, strict=True):
        title, label = PANELS[name]
        for i, (model, points) in enumerate(series[name].items()):
            if points:
                found = [value_of(value) for value in points.values()]
                (line,) = axes.plot(list(points), found, marker="o", markersize=3, label=model, color=f"C{i}")
                bounds = [(n, e.low, e.high) for n, e in points.items() if getattr(e, "low", None) is not None]
                if bounds:
                    axes.fill_between(*zip(*bounds, strict=True), alpha=0.15, color=line.get_color(), linewidth=0)
        if window:
            axes.axvline(window, color="grey", linestyle=":", label=f"window of {window}")
        axes.set(title=title, xlabel=label)
        if name == "position":
            axes.set_yscale("log")
        else:
            ticks = sorted({n for points in series[name].values() for n in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(n) for n in ticks])
        is_share = SHARES.fullmatch(name)
        if is_share:
            axes.set_ylim(-0.05, 1.05)
        if name in ("tail_ppl", "ppl", "sliding_ppl"):
            axes.set_yscale("log")
        if not is_share:
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    entries = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    options = {"loc": "outside lower center", "ncols": min(len(shown), 3), "fontsize": "small"}
    figure.legend(entries.values(), map(_short, entries), **options)
    save_figure(figure, png)


def plot_needle(results: Mapping[str, Metrics], png: Path):
    """Heatmaps of needle@N/D, one a model: length across, depth down, the share found in each cell."""
    found = {}
    for model, metrics in results.items():
        cells = ((NEEDLE.fullmatch(name), value) for name, value in metrics.items())
        found[model] = {(float(m[2]), int(m[1])): value_of(value) for m, value in cells if m}
    _plot_heatmaps(
        {model: cells for model, cells in found.items() if cells}, png, "prompt (tokens)", "depth of the needle"
    )


def plot_ruler(results: Mapping[str, Metrics], png: Path):
    """Heatmaps of ruler/TASK@N, one a model: length across, tasks down, the score in each cell."""
    found = {}
    for model, metrics in results.items():
        cells = ((RULER.fullmatch(name), value) for name, value in metrics.items())
        found[model] = {(m[1], int(m[2])): value_of(value) for m, value in cells if m}
    _plot_heatmaps({model: cells for model, cells in found.items() if cells}, png, "prompt (tokens)", "")


def _panels(num: int):
    """A figure with num panels, and their axes."""
    columns = min(num, 3)
    rows = math.ceil(num / columns)
    size = (4.6 * columns, 4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[num:]:
        axes.remove()
    return figure, list(grid.flat[:num])


def _plot_heatmaps(found: Mapping[str, Mapping[tuple, float]], png: Path, xlabel: str, ylabel: str):
    """Cells by (row, column), with values in [0, 1]; rows in the order they come in."""
    if not found:
        return
    rows = list(dict.fromkeys(row for cells in found.values() for row, _ in cells))
    columns = sorted({column for cells in found.values() for _, column in cells})
    across = min(len(found), 3)
    down = math.ceil(len(found) / across)
    size = (across * max(3.6, 1.6 + 0.7 * len(columns)), down * max(3.0, 1.4 + 0.36 * len(rows)))
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for item, axes in zip_longest(found.items(), grid.flat):
        if item is None:
            axes.axis("off")
            continue
        model, cells = item
        values = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize="x-small")
        axes.set_xticks(range(len(columns)), [f"{column:,}" for column in columns], rotation=30)
        axes.set_yticks(range(len(rows)), [f"{row:.0%}" if isinstance(row, float) else row for row in rows])
        axes.set_title(_short(model), fontsize="small")
        axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=grid, shrink=0.8)
    save_figure(figure, png)


def _series(metrics: Metrics, panel: str) -> dict[float, float | Estimate]:
    """What a panel shows of one model, by length, or by the middle of the bin."""
    if panel == "position":
        found = ((POSITION.fullmatch(name), value) for name, value in metrics.items())
        return dict(sorted(((int(m[1]) + int(m[2])) / 2, value) for m, value in found if m))
    if panel == "ruler":
        found = ((RULER.fullmatch(name), value) for name, value in metrics.items())
        by_length: dict[int, list[float]] = {}
        for match, value in found:
            if match:
                by_length.setdefault(int(match[2]), []).append(value_of(value))
        return {n: sum(scores) / len(scores) for n, scores in sorted(by_length.items())}
    return lengths_of(metrics, panel)


def _short(name: str) -> str:
    """A model's name, or the end of a long path."""
    return name if len(name) <= 40 else "..." + name[-37:]


def save_figure(figure, png: Path):
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    plt.close(figure)
