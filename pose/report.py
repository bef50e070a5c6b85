"""What a run ends with: a table in the terminal, plots, and one table over the jobs of a sweep."""

import csv
import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from pose.coverage import Coverage

Metrics = Mapping[str, float]
FAMILIES = {
    "tail_ppl": "perplexity of the last tokens",
    "ppl": "perplexity",
    "sliding_ppl": "sliding-window perplexity",
    "passkey": "passkey",
}
POSITION = re.compile(r"position_ppl@(\d+)-(\d+)")


def lengths_of(metrics: Metrics, family: str) -> dict[int, float]:
    """{N: value} of the metrics family@N, by N."""
    found = ((re.fullmatch(rf"{family}@(\d+)", name), value) for name, value in metrics.items())
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
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for i, (family, n) in enumerate(columns):
        first = i == 0 or columns[i - 1][0] != family
        table.add_column(f"{FAMILIES[family] if first else ''}\n@{n}", justify="right")
    for name, runs in rows.items():
        values = ([m[f"{family}@{n}"] for m in runs if f"{family}@{n}" in m] for family, n in columns)
        table.add_row(name, *(_cell(family, found) for (family, _), found in zip(columns, values, strict=True)))
    return table


def print_table(table: Table):
    """Prints to the terminal, or 120 columns wide to a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def plot_training(csv_file: Path, png: Path):
    """The loss over the steps, from Lightning's metrics.csv."""
    if not csv_file.is_file():  # nothing was logged: a run that was complete
        return
    with open(csv_file) as file:
        rows = [(int(row["step"]) + 1, row.get("train/loss")) for row in csv.DictReader(file)]
    rows = [(step, float(loss)) for step, loss in rows if loss]
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(*zip(*rows, strict=True), marker="o" if len(rows) < 30 else None, markersize=3)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    _save(figure, png)


def plot_results(results: Mapping[str, Metrics], png: Path, window: int | None = None):
    """Perplexity by length, perplexity by position, passkey by length; a line for each model.

    Args:
        results: metrics by model.
        png: file to write.
        window: tokens; marked by a dotted line when given.
    """
    panels = {
        "tail_ppl": ("perplexity of the last tokens", "window (tokens)"),
        "position": ("perplexity by position", "position in the window (tokens)"),
        "passkey": ("passkey accuracy", "prompt (tokens)"),
    }
    series = {
        name: {
            model: _position_series(m) if name == "position" else lengths_of(m, name) for model, m in results.items()
        }
        for name in panels
    }
    shown = [name for name in panels if any(series[name].values())]
    if not shown:
        return
    figure, all_axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 4), layout="constrained", squeeze=False)
    for name, axes in zip(shown, all_axes[0], strict=True):
        title, label = panels[name]
        for model, points in series[name].items():
            if points:
                axes.plot(list(points), list(points.values()), marker="o", markersize=3, label=model)
        if window:
            axes.axvline(window, color="grey", linestyle=":", label=f"window of {window}")
        axes.set(title=title, xlabel=label)
        if name == "position":
            axes.set_yscale("log")
        else:
            ticks = sorted({n for points in series[name].values() for n in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(n) for n in ticks])
        if name == "passkey":
            axes.set_ylim(-0.05, 1.05)
        if name == "tail_ppl":
            axes.set_yscale("log")
        if name != "passkey":
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    all_axes[0][0].legend()
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
            table.add_row(name, *map(_share, found), f"<={error:.0e}" if error else "exact")
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


def _position_series(metrics: Metrics) -> dict[float, float]:
    """{middle of the bin: perplexity}."""
    found = ((POSITION.fullmatch(name), value) for name, value in metrics.items())
    return dict(sorted(((int(m[1]) + int(m[2])) / 2, value) for m, value in found if m))


def _share(value: float) -> str:
    return f"{value:.2f}" if value == 0 or value >= 0.01 else f"{value:.0e}"


def _cell(family: str, values: list[float]) -> str:
    def show(value):
        if family == "passkey":
            return f"{value:.0%}"
        return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"

    if not values:
        return ""
    mean = show(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))}-{show(max(values))})"


def _save(figure, png: Path):
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    plt.close(figure)
