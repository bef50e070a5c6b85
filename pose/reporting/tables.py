"""Tables in the terminal: models by length, checkpoints side by side, a sweep's jobs."""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pose.errors import one_line
from pose.evaluation.task import FAMILIES, Estimate, Metric, describe, shown

log = logging.getLogger(__name__)

Metrics = Mapping[str, float] | Mapping[str, Estimate]
RULER = re.compile(r"ruler/(.+)@(\d+)")


def lengths_of(metrics: Metrics, family: str) -> dict[int, float | Estimate]:
    """{N: value} of the metrics family@N, by N."""
    found = ((re.fullmatch(rf"{re.escape(family)}@(\d+)", name), value) for name, value in metrics.items())
    return dict(sorted((int(match[1]), value) for match, value in found if match))


def series(metrics: Metrics, family: str, tasks: Collection[str] | None = None) -> dict[int, float | Estimate]:
    """By length: the metrics of a family; of RULER the mean of its tasks, of a benchmark its score at 0.

    Args:
        metrics: of a model.
        family: what a name has before its @.
        tasks: of RULER that the mean is of; None takes those that the model has at all lengths.
    """
    if family == "ruler":
        by_length = _ruler(metrics)
        tasks = common_tasks([metrics]) if tasks is None else tasks
        scores = {n: [score for task, score in found.items() if task in tasks] for n, found in by_length.items()}
        return {n: sum(found) / len(found) for n, found in sorted(scores.items()) if found}
    return {0: metrics[family]} if family in metrics else lengths_of(metrics, family)


def common_tasks(models: Iterable[Metrics]) -> set[str]:
    """The tasks of RULER that all models have at all their lengths: means of others cannot be compared."""
    found = [set(scores) for metrics in models for scores in _ruler(metrics).values()]
    return set.intersection(*found) if found else set()


def _ruler(metrics: Metrics) -> dict[int, dict[str, float]]:
    """Scores by length and task."""
    by_length: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        if match := RULER.fullmatch(name):
            by_length.setdefault(int(match[2]), {})[match[1]] = value_of(value)
    return by_length


def main_families(results: Mapping[str, Metrics | Sequence[Metrics]]) -> tuple[str, ...]:
    """What a small table shows: perplexity, passkey and needle gain where they were measured, else all that was.

    Args:
        results: as of `results_table`.
    """
    runs = [metrics for found in results.values() for metrics in _runs(found)]
    tasks = common_tasks(runs)
    # Where there is no mean of RULER that can be compared, its tasks
    alone = ("harness/",) if tasks else ("harness/", "ruler/")
    others = dict.fromkeys(name.partition("@")[0] for metrics in runs for name in metrics if name.startswith(alone))
    found = [family for family in (*FAMILIES, *others) if any(series(metrics, family, tasks) for metrics in runs)]
    perplexity = "tail_ppl" if "tail_ppl" in found else "ppl"
    return tuple(family for family in found if family in (perplexity, "passkey", "needle_gain")) or tuple(found)


def results_table(
    results: Mapping[str, Metrics | Sequence[Metrics]], title: str, families: tuple[str, ...] | None = None
) -> Table:
    """A row for each model, a column for each length of each family.

    Args:
        results: metrics or estimates by model, or a list of them (over seeds), shown as "mean (lowest to highest)".
        title: of the table.
        families: such as ppl, ruler and harness/boolq, of which only those found are shown; None: `main_families`.
    """
    families = main_families(results) if families is None else families
    rows = {name: _runs(found) for name, found in results.items()}
    tasks = common_tasks(metrics for runs in rows.values() for metrics in runs)
    found = {
        (name, family): [series(metrics, family, tasks) for metrics in runs]
        for name, runs in rows.items()
        for family in families
    }
    columns = [
        (family, n)
        for family in families
        for n in sorted({n for name in rows for by_length in found[name, family] for n in by_length})
    ]
    table = new_table(title)
    table.add_column("", overflow="fold")
    for i, (family, n) in enumerate(columns):
        first = i == 0 or columns[i - 1][0] != family
        title = escaped(describe(family).title) if first else ""
        table.add_column(f"{title}\n@{n}" if n else title, justify="right")
    for name in rows:
        cells = (
            _cell(family, [value_of(by_length[n]) for by_length in found[name, family] if n in by_length])
            for family, n in columns
        )
        table.add_row(escaped(name), *cells)
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
        table = new_table(title)
        table.add_column("", overflow="fold", max_width=40)
        for n in lengths:
            table.add_column(f"@{n:,}", justify="right")
        for family, rows in by_family.items():
            if any(rows.values()):
                table.add_row(f"[bold]{escaped(describe(family).title)}")
                for checkpoint, row in rows.items():
                    table.add_row(escaped(checkpoint), *(_estimate(family, row.get(n)) for n in lengths))
                table.add_section()
        tables.append(table)
    benchmarks = list(dict.fromkeys(name for name in names if name.startswith("harness/")))
    if benchmarks:
        table = new_table("Standard benchmarks")
        table.add_column("", overflow="fold", max_width=40)
        for name in benchmarks:
            table.add_column(escaped(name.removeprefix("harness/")), justify="right", overflow="fold")
        for checkpoint, found in results.items():
            table.add_row(escaped(checkpoint), *(_estimate(name, found.get(name), described) for name in benchmarks))
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


def new_table(title: str) -> Table:
    """A table without columns."""
    return Table(title=escaped(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")


def escaped(text: str) -> str:
    """A text in which rich finds no markup, in one line."""
    return escape(one_line(text))


def _runs(found: Metrics | Sequence[Metrics]) -> list[Metrics]:
    return [found] if isinstance(found, Mapping) else list(found)


def _estimate(family: str, estimate: float | Estimate | None, described: Mapping[str, Metric] | None = None) -> str:
    """A cell: the value, and below it the interval."""
    if estimate is None:
        return ""
    value = shown(family, value_of(estimate), described)
    if not isinstance(estimate, Estimate) or estimate.low is None or estimate.high is None:
        return value
    to = " to " if estimate.low < 0 else "-"  # a minus would run into it
    return f"{value}\n[dim]{to.join(shown(family, bound, described) for bound in (estimate.low, estimate.high))}"


def _cell(family: str, values: list[float]) -> str:
    if not values:
        return ""
    mean = shown(family, sum(values) / len(values))
    if len(values) == 1 or any(map(math.isnan, values)):
        return mean
    return f"{mean} ({shown(family, min(values))}-{shown(family, max(values))})"
