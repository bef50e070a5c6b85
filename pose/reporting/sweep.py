"""What a sweep leaves: sweep.csv after every job, and one table at the end."""

import csv
import logging
import math
from collections import Counter
from pathlib import Path

import yaml

from pose.files import atomic_file, read_json
from pose.reporting import lines
from pose.reporting.lines import recipe
from pose.reporting.tables import Metrics, print_table, results_table

log = logging.getLogger(__name__)

OVERRIDES = Path(".hydra") / "overrides.yaml"  # of a job, before anything is checked


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
    """Puts seeds of one recipe into one row, as `pose.reporting.lines.over_seeds` has it.

    Args:
        jobs: the overrides of each, separated by spaces, and its metrics.
    """

    def recipe_of(job: tuple[str, Metrics]) -> str:
        return " ".join(recipe(job[0].split(" ")))

    def all_of(job: tuple[str, Metrics]) -> str:
        return " ".join(part for part in job[0].split(" ") if not part.startswith("seed="))

    def seed_of(job: tuple[str, Metrics]) -> str:
        return " ".join(part for part in job[0].split(" ") if part.startswith("seed="))

    num_of, rows = Counter(map(recipe_of, jobs)), {}
    for group in lines.over_seeds(jobs, recipe_of, all_of, seed_of):
        is_alone = num_of[recipe_of(group[0])] == len(group)
        rows[(recipe_of if is_alone else all_of)(group[0]) or "default"] = [metrics for _, metrics in group]
    return rows


def write_sweep(folder: Path) -> list[tuple[str, Metrics]]:
    """Writes sweep.csv, a row for each job that is complete; returns overrides and metrics of each.

    A training that was begun again for more steps, and does not have them yet, is not complete.

    An evaluation of several checkpoints is a row for each of them, with its name after the overrides.
    """
    jobs: list[tuple[str, Metrics]] = []
    for file in sorted(folder.glob("*/metrics.json"), key=lambda f: (len(f.parent.name), f.parent.name)):
        content = read_json(file)
        found = {"": _numbers(content)}
        if not found[""]:
            found = {name: _numbers(each) for name, each in content.items() if isinstance(each, dict)}
        overrides = overrides_of(file.parent)
        if content and (why := lines.unfinished(content, _max_steps(file.parent))):
            log.warning(f"{file.parent} is left out of the sweep's table: {why}")
        elif any(found.values()) and overrides is not None:
            jobs += [(" ".join([*overrides, *filter(None, [name])]), each) for name, each in found.items()]
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


def overrides_of(job: Path) -> list[str] | None:
    """What a job was given when it made its numbers; None where that cannot be read.

    Hydra's own file is of the last start, even of one that was refused, and is read where there is nothing else.
    """
    provenance = read_json(job / "results.json").get("provenance") or read_json(job / "provenance.json")
    found = provenance.get("overrides") if isinstance(provenance, dict) else None
    if found is None:
        try:
            found = yaml.safe_load((job / OVERRIDES).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
    return [str(each) for each in found] if isinstance(found, list) else None


def _numbers(found: dict) -> Metrics:
    """Those of a metrics.json, where null is what is not a number."""
    named = {name: math.nan if value is None else value for name, value in found.items()}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}
