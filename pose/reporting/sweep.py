"""What a sweep leaves: sweep.csv after every job, and one table at the end."""

import csv
import logging
import math
from pathlib import Path
from typing import Any

import yaml

from pose.files import atomic_file, read_json
from pose.reporting.lines import is_of_others, recipe, unfinished
from pose.reporting.tables import Metrics, print_table, results_table

log = logging.getLogger(__name__)


def show_sweep(folder: Path):
    """One table over all jobs, seeds of one recipe in one row.

    Args:
        folder: of the sweep, with a folder for each job.
    """
    jobs = write_sweep(folder)
    if jobs:
        print_table(results_table(over_seeds(jobs), f"Sweep ({folder}/sweep.csv)"))
    else:  # that of before
        (folder / "sweep.csv").unlink(missing_ok=True)


def over_seeds(jobs: list[tuple[str, Metrics]]) -> dict[str, list[Metrics]]:
    """Puts seeds of one recipe into one row: jobs that differ in nothing but what seeds may differ in (`recipe`).

    Where two have one seed, those that differ in nothing but their seed.

    Args:
        jobs: the overrides of each, separated by spaces, and its metrics.
    """
    rows: dict[str, list[Metrics]] = {}
    by_recipe: dict[str, list[list[str]]] = {}
    for overrides, _ in jobs:
        by_recipe.setdefault(" ".join(recipe(overrides.split(" "))), []).append(_seed(overrides))
    for overrides, metrics in jobs:
        name = " ".join(recipe(overrides.split(" ")))
        seeds = by_recipe[name]
        if any(seeds.count(seed) > 1 for seed in seeds):
            name = " ".join(part for part in overrides.split(" ") if not part.startswith("seed="))
        rows.setdefault(name or "default", []).append(metrics)
    return rows


def _seed(overrides: str) -> list[str]:
    return [part for part in overrides.split(" ") if part.startswith("seed=")]


def write_sweep(folder: Path) -> list[tuple[str, Metrics]]:
    """Writes sweep.csv, a row for each job that is complete; returns overrides and metrics of each.

    A job that was begun again with other settings, such as more steps, and has not come to its end is not complete: its
    metrics are not of its overrides.

    An evaluation of several checkpoints is a row for each of them, with its name after the overrides.
    """
    jobs: list[tuple[str, Metrics]] = []
    for file in sorted(folder.glob("*/metrics.json"), key=lambda f: (len(f.parent.name), f.parent.name)):
        content = read_json(file)
        found = {"": _numbers(content)}
        if not found[""]:
            found = {name: _numbers(each) for name, each in content.items() if isinstance(each, dict)}
        try:
            overrides = yaml.safe_load((file.parent / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            overrides = None
        why = unfinished(content, _max_steps(file.parent)) if content else ""
        if is_of_others(overrides, _recorded(file.parent)):
            why = "what was measured is of an earlier start, with other settings"
        if why:
            log.warning(f"{file.parent} is left out of the sweep's table: {why}")
        elif any(found.values()) and isinstance(overrides, list):
            jobs += [(" ".join(map(str, [*overrides, *filter(None, [name])])), each) for name, each in found.items()]
        else:
            log.warning(f"{file.parent} is left out of the sweep's table: its metrics or overrides cannot be read")
    if jobs:
        names = sorted({name for _, metrics in jobs for name in metrics})
        with atomic_file(folder / "sweep.csv", newline="") as table:  # jobs may end at the same moment
            writer = csv.DictWriter(table, ["overrides", *names])
            writer.writeheader()
            writer.writerows({"overrides": overrides} | dict(metrics) for overrides, metrics in jobs)
    return jobs


def _max_steps(job: Path) -> int | None:
    """That a training's config asks for; None where there are none, or they cannot be read."""
    try:
        return int(yaml.safe_load((job / "config.yaml").read_text(encoding="utf-8"))["trainer"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _recorded(job: Path) -> Any:
    """The overrides that a job's numbers were made with: an evaluation keeps them with these."""
    provenance = read_json(job / "results.json").get("provenance") or read_json(job / "provenance.json")
    return provenance.get("overrides") if isinstance(provenance, dict) else None


def _numbers(found: dict) -> Metrics:
    """Those of a metrics.json, where null is what is not a number."""
    named = {name: math.nan if value is None else value for name, value in found.items()}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}
