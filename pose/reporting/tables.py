"""Tables in the terminal: models by length, checkpoints side by side, a sweep's jobs."""

import logging
import re
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pose.errors import one_line
from pose.evaluation.task import FAMILIES, Estimate, Metric, describe, shown

log = logging.getLogger(__name__)

Metrics = Mapping[str, float] | Mapping[str, Estimate]


def lengths_of(metrics: Metrics, family: str) -> dict[int, float | Estimate]:
    """{N: value} of the metrics family@N, by N."""
    found = ((re.fullmatch(rf"{re.escape(family)}@(\d+)", name), value) for name, value in metrics.items())
    return dict(sorted((int(match[1]), value) for match, value in found if match))


def results_table(results: Mapping[str, Metrics | Sequence[Metrics]], title: str, families: tuple[str, ...]) -> Table:
    """A row for each model, a column for each length of each family.

    Args:
        results: metrics or estimates by model, or a list of them (over seeds), shown as "mean (lowest to highest)".
        title: of the table.
        families: such as ppl and passkey, of which only those found are shown.
    """
    rows = {name: [found] if isinstance(found, Mapping) else list(found) for name, found in results.items()}
    columns = [
        (family, n)
        for family in families
        for n in sorted({n for runs in rows.values() for metrics in runs for n in lengths_of(metrics, family)})
    ]
    table = _table(title)
    table.add_column("", overflow="fold")
    for i, (family, n) in enumerate(columns):
        first = i == 0 or columns[i - 1][0] != family
        table.add_column(f"{_name(describe(family).title) if first else ''}\n@{n}", justify="right")
    for name, runs in rows.items():
        values = ([value_of(m[f"{family}@{n}"]) for m in runs if f"{family}@{n}" in m] for family, n in columns)
        table.add_row(_name(name), *(_cell(family, found) for (family, _), found in zip(columns, values, strict=True)))
    return table


def comparison_tables(
    results: Mapping[str, Mapping[str, Estimate]], title: str, described: Mapping[str, Metric] | None = None
) -> list[Table]:
    """Checkpoints side by side: a table by length, a part of it for each family, and one of standard benchmarks.

    Args:
        results: estimates by checkpoint; a cell has the value, and below it its 95 % interval.
        title: of the first table.
        described: what the tasks say of their metrics, by name; of others only what their names tell is known.
    """
    names = [name for found in results.values() for name in found]
    families = [*FAMILIES, *dict.fromkeys(name.split("@")[0] for name in names if name.startswith("ruler/"))]
    by_family = {
        family: {checkpoint: lengths_of(found, family) for checkpoint, found in results.items()} for family in families
    }
    lengths = sorted({n for rows in by_family.values() for row in rows.values() for n in row})
    tables = []
    if lengths:
        table = _table(title)
        table.add_column("", overflow="fold", max_width=40)
        for n in lengths:
            table.add_column(f"@{n:,}", justify="right")
        for family, rows in by_family.items():
            if any(rows.values()):
                table.add_row(f"[bold]{_name(describe(family).title)}")
                for checkpoint, row in rows.items():
                    table.add_row(_name(checkpoint), *(_estimate(family, row.get(n)) for n in lengths))
                table.add_section()
        tables.append(table)
    benchmarks = list(dict.fromkeys(name for name in names if name.startswith("harness/")))
    if benchmarks:
        table = _table("Standard benchmarks")
        table.add_column("", overflow="fold", max_width=40)
        for name in benchmarks:
            table.add_column(_name(name.removeprefix("harness/")), justify="right", overflow="fold")
        for checkpoint, found in results.items():
            table.add_row(_name(checkpoint), *(_estimate(name, found.get(name), described) for name in benchmarks))
        tables.append(table)
    return tables


def print_table(table: Table):
    """Logs a table, as wide as the terminal, or 120 columns wide where there is none."""
    width = None if Console().is_terminal else 120
    console = Console(width=width, color_system=None, emoji=False)
    with console.capture() as captured:
        console.print(table)
    lines = (line.rstrip() for line in captured.get().splitlines())
    log.info("\n".join(lines).strip("\n"))


def value_of(metric: float | Estimate) -> float:
    """Of a number or an estimate."""
    return metric.value if isinstance(metric, Estimate) else metric


def _table(title: str) -> Table:
    return Table(title=_name(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")


def _name(text: str) -> str:
    """A text in which rich finds no markup, in one line."""
    return escape(one_line(text))


def _estimate(family: str, estimate: float | Estimate | None, described: Mapping[str, Metric] | None = None) -> str:
    """A cell: the value, and below it the interval."""
    if estimate is None:
        return ""
    value = shown(family, value_of(estimate), described)
    if not isinstance(estimate, Estimate) or estimate.low is None or estimate.high is None:
        return value
    return f"{value}\n[dim]{'-'.join(shown(family, bound, described) for bound in (estimate.low, estimate.high))}"


def _cell(family: str, values: list[float]) -> str:
    if not values:
        return ""
    mean = shown(family, sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({shown(family, min(values))}-{shown(family, max(values))})"
