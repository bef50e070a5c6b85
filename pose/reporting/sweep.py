"""What a sweep leaves: sweep.csv after every job, and one table at the end."""

import csv
import json
import os
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf

from pose.reporting.tables import Metrics, print_table, results_table


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
