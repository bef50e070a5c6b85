"""What a run ends with: a table in the terminal, plots, and one table over the jobs of a sweep."""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pose.coverage import Coverage
from pose.evaluation.task import Estimate

Metrics = Mapping[str, float]  # or estimates (pose.evaluation.task), which have an interval
FAMILIES = {
    "ppl": "perplexity",
    "tail_ppl": "perplexity of the last tokens",
    "sliding_ppl": "sliding-window perplexity",
    "bits_per_byte": "bits per byte",
    "passkey": "passkey",
    "needle": "needle",
}
SHARES = re.compile("passkey|needle|ruler(/.*)?|harness/.*")  # families whose values are shares, in [0, 1]
POSITION = re.compile(r"position_ppl@(\d+)-(\d+)")
NEEDLE = re.compile(r"needle@(\d+)/([\d.]+)")
RULER = re.compile(r"ruler/(.+)@(\d+)")


def lengths_of(metrics: Metrics, family: str) -> dict[int, float]:
    """{N: value} of the metrics family@N, by N."""
    found = ((re.fullmatch(rf"{re.escape(family)}@(\d+)", name), value) for name, value in metrics.items())
    return dict(sorted((int(match[1]), value) for match, value in found if match))


def results_table(results: Mapping[str, Metrics | list[Metrics]], title: str, families: tuple[str, ...]) -> Table:
    """A row for each model, a column for each length of each family.

    Args:
        results: metrics by model, or a list of them (over seeds), shown as "mean (lowest to highest)".
        title: of the table.
        families: such as ppl and passkey, of which only those found are shown.
    """
    rows = {name: metrics if isinstance(metrics, list) else [metrics] for name, metrics in results.items()}
    columns = [
        (family, n)
        for family in families
        for n in sorted({n for runs in rows.values() for metrics in runs for n in lengths_of(metrics, family)})
    ]
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for i, (family, n) in enumerate(columns):
        first = i == 0 or columns[i - 1][0] != family
        table.add_column(f"{FAMILIES[family] if first else ''}\n@{n}", justify="right")
    for name, runs in rows.items():
        values = ([m[f"{family}@{n}"] for m in runs if f"{family}@{n}" in m] for family, n in columns)
        table.add_row(escape(name), *(_cell(family, found) for (family, _), found in zip(columns, values, strict=True)))
    return table


def comparison_tables(results: Mapping[str, Mapping[str, Estimate]], title: str) -> list[Table]:
    """Checkpoints side by side: a table by length, a part of it for each family, and one of standard benchmarks.

    Args:
        results: estimates by checkpoint; a cell has the value, and below it its 95 % interval.
        title: of the first table.
    """
    names = [name for found in results.values() for name in found]
    families = [*FAMILIES, *dict.fromkeys(name.split("@")[0] for name in names if name.startswith("ruler/"))]
    by_family = {
        family: {checkpoint: lengths_of(found, family) for checkpoint, found in results.items()} for family in families
    }
    lengths = sorted({n for rows in by_family.values() for row in rows.values() for n in row})
    tables = []
    if lengths:
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("", overflow="fold", max_width=40)
        for n in lengths:
            table.add_column(f"@{n:,}", justify="right")
        for family, rows in by_family.items():
            if any(rows.values()):
                table.add_row(f"[bold]{FAMILIES.get(family, family)}")
                for checkpoint, row in rows.items():
                    table.add_row(escape(checkpoint), *(_estimate(family, row.get(n)) for n in lengths))
                table.add_section()
        tables.append(table)
    benchmarks = list(dict.fromkeys(name for name in names if name.startswith("harness/")))
    if benchmarks:
        table = Table(title="Standard benchmarks", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("", overflow="fold", max_width=40)
        for name in benchmarks:
            table.add_column(name.removeprefix("harness/"), justify="right", overflow="fold")
        for checkpoint, found in results.items():
            table.add_row(escape(checkpoint), *(_estimate(name, found.get(name)) for name in benchmarks))
        tables.append(table)
    return tables


def print_table(table: Table):
    """Prints to the terminal, or 120 columns wide to a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


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
    _save(figure, png)


def _panels(num: int):
    """A figure with num panels, and their axes."""
    columns = min(num, 3)
    rows = math.ceil(num / columns)
    size = (4.6 * columns, 4 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[num:]:
        axes.remove()
    return figure, list(grid.flat[:num])


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
                found = [_value(value) for value in points.values()]
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
    _save(figure, png)


def plot_needle(results: Mapping[str, Metrics], png: Path):
    """Heatmaps of needle@N/D, one a model: length across, depth down, the share found in each cell."""
    found = {}
    for model, metrics in results.items():
        cells = ((NEEDLE.fullmatch(name), value) for name, value in metrics.items())
        found[model] = {(float(m[2]), int(m[1])): _value(value) for m, value in cells if m}
    _plot_heatmaps(
        {model: cells for model, cells in found.items() if cells}, png, "prompt (tokens)", "depth of the needle"
    )


def plot_ruler(results: Mapping[str, Metrics], png: Path):
    """Heatmaps of ruler/TASK@N, one a model: length across, tasks down, the score in each cell."""
    found = {}
    for model, metrics in results.items():
        cells = ((RULER.fullmatch(name), value) for name, value in metrics.items())
        found[model] = {(m[1], int(m[2])): _value(value) for m, value in cells if m}
    _plot_heatmaps({model: cells for model, cells in found.items() if cells}, png, "prompt (tokens)", "")


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
    _save(figure, png)


def coverage_table(covered: Mapping[str, Coverage], title: str) -> Table:
    """Probability and pairs, by bins of distance that follow L and T; a row for each sampler in each of three parts.

    Args:
        covered: by name of the sampler; all of the same lengths.
        title: of the table.
    """
    first = next(iter(covered.values()))
    bins = list(pairwise(_distance_bins(first.train_len, first.target_len)))
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("distance", overflow="fold", max_width=24)
    for low, high in bins:
        table.add_column(f"{low}\n-{high - 1}", justify="right")
    table.add_column("standard\nerror", justify="right")
    for part, values, errors, reduce in (
        ("mean probability", "probability", "probability_error", np.mean),
        ("lowest probability", "probability", "probability_error", np.min),
        ("share of pairs", "pair_share", "pair_share_error", np.sum),
    ):
        table.add_row(f"[bold]{part}")
        for name, c in covered.items():
            found = (reduce(getattr(c, values)[low - 1 : high - 1]) for low, high in bins)
            error = getattr(c, errors).max(initial=0)
            table.add_row(escape(name), *map(_share, found), f"<={error:.0e}" if error else "exact")
        table.add_section()
    return table


def plot_coverage(covered: Mapping[str, Coverage], png: Path):
    """Probability of each distance, and its pairs relative to an even spread; a line for each sampler.

    Args:
        covered: by name of the sampler; all of the same lengths.
        png: file to write.
    """
    L, T = (getattr(next(iter(covered.values())), name) for name in ("train_len", "target_len"))
    figure, all_axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, c in covered.items():
        relative = c.pair_share * len(c.distance)
        all_axes[0].plot(c.distance, c.probability, label=name, linewidth=1.2)
        all_axes[1].plot(c.distance[relative > 0], relative[relative > 0], linewidth=1.2)
    all_axes[0].set(ylabel="probability that an example contains it", ylim=(-0.02, 1.02))
    all_axes[1].set(ylabel="pairs of tokens, relative to an even spread", yscale="log", ylim=(1e-3, None))
    all_axes[1].axhline(1, color="grey", linestyle=":", linewidth=1)
    for axes in all_axes:
        for at, label in ((L, f"L = {L}"), (T - L, f"T - L = {T - L}")):
            axes.axvline(at, color="grey", linestyle=":", linewidth=1)
            axes.text(at, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", fontsize="small")
        axes.set(xlabel="distance (tokens)", xlim=(0, T))
    figure.legend(loc="outside lower center", ncols=6)
    _save(figure, png)


class SweepTable(Callback):
    """A Hydra callback: sweep.csv after every job of a multirun, and one table at its end."""

    def on_job_end(self, config, job_return, **kwargs):
        if config.hydra.mode.name == "MULTIRUN":
            _write_sweep(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config, **kwargs):
        folder = Path(config.hydra.sweep.dir)
        jobs = _write_sweep(folder)
        if jobs:
            print_table(results_table(over_seeds(jobs), f"Sweep ({folder}/sweep.csv)", ("tail_ppl", "passkey")))


def over_seeds(jobs: list[tuple[str, Metrics]]) -> dict[str, list[Metrics]]:
    """Puts jobs that differ in nothing but their seed into one row.

    Args:
        jobs: the overrides of each, separated by spaces, and its metrics.
    """
    rows: dict[str, list[Metrics]] = {}
    for overrides, metrics in jobs:
        name = " ".join(part for part in overrides.split(" ") if not part.startswith("seed="))
        rows.setdefault(name or "default", []).append(metrics)
    return rows


def _write_sweep(folder: Path) -> list[tuple[str, Metrics]]:
    jobs = []
    for file in sorted(folder.glob("*/metrics.json"), key=lambda f: (len(f.parent.name), f.parent.name)):
        overrides = OmegaConf.to_container(OmegaConf.load(file.parent / ".hydra" / "overrides.yaml"))
        metrics = {k: v for k, v in json.loads(file.read_text()).items() if isinstance(v, int | float)}
        jobs.append((" ".join(overrides), metrics))
    if jobs:
        names = sorted({name for _, metrics in jobs for name in metrics})
        partial = folder / f"sweep.csv.{os.getpid()}"  # jobs may end at the same moment
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, ["overrides", *names])
            writer.writeheader()
            writer.writerows({"overrides": overrides} | dict(metrics) for overrides, metrics in jobs)
        os.replace(partial, folder / "sweep.csv")
    return jobs


def _distance_bins(train_len: int, target_len: int) -> list[int]:
    """Edges: 1, L/4, powers of two times L up to T-L, the last L distances, the last L/8."""
    edges = {1, train_len // 4, target_len - train_len, target_len - train_len // 8}
    edges |= {train_len << i for i in range(64) if train_len << i < target_len - train_len}
    return [*sorted(edge for edge in edges if 1 <= edge < target_len), target_len]


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
                by_length.setdefault(int(match[2]), []).append(_value(value))
        return {n: sum(scores) / len(scores) for n, scores in sorted(by_length.items())}
    return lengths_of(metrics, panel)


def _short(name: str) -> str:
    """A model's name, or the end of a long path."""
    return name if len(name) <= 40 else "..." + name[-37:]


def _value(metric) -> float:
    """Of a number or an estimate."""
    return getattr(metric, "value", metric)


def _estimate(family: str, estimate) -> str:
    """A cell: the value, and below it the interval."""
    if estimate is None:
        return ""
    value = _show(family, estimate.value)
    return (
        value if estimate.low is None else f"{value}\n[dim]{_show(family, estimate.low)}-{_show(family, estimate.high)}"
    )


def _share(value: float) -> str:
    return f"{value:.2f}" if value == 0 or value >= 0.01 else f"{value:.0e}"


def _show(family: str, value: float) -> str:
    if SHARES.fullmatch(family) and value <= 1:  # a benchmark may report a perplexity
        return f"{value:.1%}" if family.startswith("harness/") else f"{value:.0%}"
    if family == "bits_per_byte":
        return f"{value:.3f}"
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def _cell(family: str, values: list[float]) -> str:
    if not values:
        return ""
    mean = _show(family, sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({_show(family, min(values))}-{_show(family, max(values))})"


def _save(figure, png: Path):
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    plt.close(figure)
