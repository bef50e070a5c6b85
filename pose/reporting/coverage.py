"""Which distances a sampler covers, as a table and a plot."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from pose.coverage import Coverage
from pose.reporting.plots import COLORS, label_of, save_figure
from pose.reporting.tables import escaped, new_table


def coverage_table(covered: Mapping[str, Coverage], title: str) -> Table:
    """Probability and pairs, by bins of distance that follow L and T; a row for each sampler in each of three parts.

    Args:
        covered: by name of the sampler; all of the same lengths.
        title: of the table.
    """
    first = next(iter(covered.values()))
    bins = list(pairwise(_distance_bins(first.train_len, first.target_len)))
    table = new_table(title)
    table.add_column("distance", overflow="fold", max_width=24)
    for low, high in bins:
        table.add_column(f"{low} to\n{high - 1}", justify="right")
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
            table.add_row(escaped(name), *map(_share, found), f"<={error:.0e}" if error else "exact")
        table.add_section()
    return table


def plot_coverage(covered: Mapping[str, Coverage], png: Path):
    """Probability of each distance, and its pairs relative to an even spread; a line for each sampler.

    Args:
        covered: by name of the sampler; all of the same lengths.
        png: file to write.
    """
    L, T = (getattr(next(iter(covered.values())), name) for name in ("train_len", "target_len"))
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    all_axes = figure.subplots(1, 2)
    for i, (name, c) in enumerate(covered.items()):
        relative = c.pair_share * len(c.distance)
        style = {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--")[i // len(COLORS) % 2], "linewidth": 1.2}
        all_axes[0].plot(c.distance, c.probability, label=label_of(name), **style)
        all_axes[1].plot(c.distance[relative > 0], relative[relative > 0], **style)
    all_axes[0].set(ylabel="probability that an example contains it", ylim=(-0.02, 1.02))
    all_axes[1].set(ylabel="pairs of tokens, relative to an even spread", yscale="log", ylim=(1e-3, None))
    all_axes[1].axhline(1, color="grey", linestyle=":", linewidth=1)
    for axes in all_axes:
        for at, label in ((L, f"L = {L}"), (T - L, f"T - L = {T - L}")):
            axes.axvline(at, color="grey", linestyle=":", linewidth=1)
            axes.text(at, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", fontsize="small")
        axes.set(xlabel="distance (tokens)", xlim=(0, T))
    figure.legend(loc="outside lower center", ncols=6)
    save_figure(figure, png)


def _distance_bins(train_len: int, target_len: int) -> list[int]:
    """Edges: 1, L/4, powers of two times L up to T-L, the last L distances, the last L/8."""
    edges = {1, train_len // 4, target_len - train_len, target_len - train_len // 8}
    edges |= {train_len << i for i in range(64) if train_len << i < target_len - train_len}
    return [*sorted(edge for edge in edges if 1 <= edge < target_len), target_len]


def _share(value: float) -> str:
    return f"{value:.2f}" if value == 0 or value >= 0.01 else f"{value:.0e}"
