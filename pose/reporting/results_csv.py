"""results.csv: every estimate of every model that was measured, a row each."""

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pose.evaluation.task import Estimate
from pose.files import atomic_file


def write_results(file: Path, results: Mapping[str, Mapping[str, Estimate]]):
    """Writes the columns checkpoint, metric, value, low, high, num in one step.

    Args:
        file: to write.
        results: estimates by model.
    """
    with atomic_file(file, newline="") as table:
        writer = csv.DictWriter(table, ["checkpoint", "metric", *Estimate._fields])
        writer.writeheader()
        writer.writerows(
            {"checkpoint": name, "metric": metric} | estimate._asdict()
            for name, found in results.items()
            for metric, estimate in found.items()
        )


def read_results(file: Path) -> dict[str, dict[str, Estimate]]:
    """Estimates by model; {} where there is no such file, and without the rows that cannot be read."""
    results: dict[str, dict[str, Estimate]] = {}
    with suppress(OSError, csv.Error), open(file, encoding="utf-8", errors="replace", newline="") as table:
        for row in csv.DictReader(table):
            with suppress(KeyError, TypeError, ValueError):
                low, high = (float(row[bound]) if row[bound] else None for bound in ("low", "high"))
                estimate = Estimate(float(row["value"]), low, high, int(row["num"]))
                results.setdefault(row["checkpoint"], {})[row["metric"]] = estimate
    return results
