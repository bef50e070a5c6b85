"""What a sweep leaves: sweep.csv after every job, and one table at the end."""

import csv
import logging
import math
from pathlib import Path

import yaml

from pose.files import atomic_file, read_json
from pose.reporting.lines import is_without_effect, unfinished
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


def over_seeds(jobs: list[tuple[str, Metrics]]) -> dict[str, list[Metrics]]:
    """Puts jobs into one row that differ in nothing but what seeds may differ in (`is_without_effect`).

    Args:
        jobs: the overrides of each, separated by spaces, and its metrics.
    """
    rows: dict[str, list[Metrics]] = {}
    for overrides, metrics in jobs:
        name = " ".join(part for part in overrides.split(" ") if not is_without_effect(part.partition("=")[0]))
        rows.setdefault(name or "default", []).append(metrics)
    return rows


def write_sweep(folder: Path) -> list[tuple[str, Metrics]]:
    """Writes sweep.csv, a row for each job that is complete; returns overrides and metrics of each.

    A training that was begun again for more steps and has not reached them is not complete: its metrics are of fewer
    steps than its overrides say.

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
        if content and (why := unfinished(content, _max_steps(file.parent, overrides))):
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
    else:
        (folder / "sweep.csv").unlink(missing_ok=True)
    return jobs


def _max_steps(job: Path, overrides: list | None) -> int | None:
    """That a training was asked for: by its overrides, which are there before its config is; else by that.

    None where there are none, or they cannot be read.
    """
    given = [str(each).partition("=")[2] for each in overrides or [] if str(each).startswith("trainer.max_steps=")]
    try:
        config = yaml.safe_load((job / "config.yaml").read_text(encoding="utf-8"))
        return int(given[-1]) if given and given[-1].isdecimal() else int(config["trainer"]["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _numbers(found: dict) -> Metrics:
    """Those of a metrics.json, where null is what is not a number."""
    named = {name: math.nan if value is None else value for name, value in found.items()}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}
