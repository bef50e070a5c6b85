"""What a sweep leaves: sweep.csv after every job, and one table at the end."""

import csv
import json
from pathlib import Path

from omegaconf import OmegaConf

from pose.files import atomic_file
from pose.reporting.tables import Metrics, print_table, results_table


def show_sweep(folder: Path):
    """One table over all jobs, those that differ in nothing but their seed in one row.

    Args:
        folder: of the sweep, with a folder for each job.
    """
    jobs = write_sweep(folder)
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


def write_sweep(folder: Path) -> list[tuple[str, Metrics]]:
    """Writes sweep.csv, a row for each job that is complete; returns overrides and metrics of each."""
    jobs = []
    for file in sorted(folder.glob("*/metrics.json"), key=lambda f: (len(f.parent.name), f.parent.name)):
        overrides = OmegaConf.to_container(OmegaConf.load(file.parent / ".hydra" / "overrides.yaml"))
        metrics = {k: v for k, v in json.loads(file.read_text()).items() if isinstance(v, int | float)}
        jobs.append((" ".join(overrides), metrics))
    if jobs:
        names = sorted({name for _, metrics in jobs for name in metrics})
        with atomic_file(folder / "sweep.csv", newline="") as file:
            writer = csv.DictWriter(file, ["overrides", *names])
            writer.writeheader()
            writer.writerows({"overrides": overrides} | dict(metrics) for overrides, metrics in jobs)
    return jobs
