"""What a run shows in W&B and TensorBoard beside what it logs while it trains (docs/WANDB.md).

Metrics are in groups: train/ and val/ are logged while it trains, cost/ too, eval/ at the end. W&B has no curves over
anything but what was logged step by step, so each length is logged as a step of its own: eval/FAMILY over eval/length.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from pose.evaluation.task import Estimate
from pose.files import read_json
from pose.reporting.plots import NEEDLE, PANELS, POSITION, points_of
from pose.reporting.tables import value_of

MAX_BINS = 400  # of distances in the table of coverage
CURVES = {  # what curves are drawn over, and of which panels
    "eval/length": tuple(panel for panel in PANELS if panel != "position"),
    "eval/position": ("position",),
}
CURVE_NAMES = {"position": "position_ppl"}  # where it is not the panel's
FIGURES = ("evaluation", "needle", "needle_gain", "ruler", "training", "coverage")  # of RUN/plots, where they are
FILES = ("README.md", "metrics.json", "results.csv", "config.yaml")  # of the artifact, as far as they are there
BOUNDS = ("value", "low", "high", "num")  # of an estimate; low and high are its 95 % interval

Tables = dict[str, tuple[list[str], list[list[Any]]]]


@dataclass(frozen=True)
class Finished:
    """A run that has written its folder.

    Attributes:
        folder: of the run.
        step: optimizer steps done.
        settings: what runs are told apart by, and `cfg`, the config.
        results: estimates by model: untuned, scaled, extended.
        window: of the model before, in tokens.
        target: that was trained for, in tokens.
        with_weights: whether W&B gets RUN/model.
    """

    folder: Path
    step: int
    settings: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Estimate]]
    window: int
    target: int
    with_weights: bool = False


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any]):
    """Gives W&B the config when a run begins, so that one that is at work is found by it.

    TensorBoard takes it at the end, with what came of it.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(dict(settings))


def log_finished(loggers: Sequence[Logger], run: Finished):
    """Gives W&B metrics, curves by length, tables, figures and files; TensorBoard metrics, figures and hparams."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, run)
        elif isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger, run)


def summary(run: Finished) -> dict[str, float]:
    """Single numbers: eval/METRIC of the extended model, eval/MODEL/METRIC of the others, costs and coverage.

    A metric at the model's own window or at the target is there a second time as eval/window/FAMILY and
    eval/target/FAMILY, by which models of different lengths are compared; W&B sorts and filters by names without an @.
    Depths and positions are in the tables alone.
    """
    found = {
        name: value
        for name, value in read_json(run.folder / "metrics.json").items()
        if name.startswith(("cost/", "coverage/", "best/"))
    }
    places = {"window": str(run.window), "target": str(run.target)}
    for model, estimates in run.results.items():
        for name, estimate in estimates.items():
            if not (POSITION.fullmatch(name) or NEEDLE.fullmatch(name)):
                found[_prefix(model) + name] = estimate.value
                family, _, length = name.partition("@")
                for place in [place for place, at in places.items() if at == length]:
                    found[f"{_prefix(model)}{place}/{family}"] = estimate.value
    return found


def curves(results: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[float, dict[str, float]]]:
    """By what they are drawn over, and where: the values of eval/FAMILY and eval/MODEL/FAMILY."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for over, panels in CURVES.items():
        rows: dict[float, dict[str, float]] = {}
        for model, estimates in results.items():
            for panel in panels:
                name = _prefix(model) + CURVE_NAMES.get(panel, panel)
                for at, value in points_of(estimates, panel).items():
                    if at:  # a benchmark has no length
                        rows.setdefault(at, {})[name] = value_of(value)
        found[over] = dict(sorted(rows.items()))
    return found


def tables(run: Finished) -> Tables:
    """Columns and rows of what was measured, by length, by depth, by position and of benchmarks, and of the coverage.

    What was not measured has no table.
    """
    found: Tables = {
        "tables/by_length": (["model", "metric", "length", *BOUNDS], []),
        "tables/by_depth": (["model", "metric", "length", "depth", *BOUNDS], []),
        "tables/by_position": (["model", "from", "to", *BOUNDS], []),
        "tables/benchmarks": (["model", "metric", *BOUNDS], []),
        "tables/coverage": (["from", "to", "probability", "pair_share"], _coverage(run.folder / "coverage.csv")),
    }
    row: list[Any]
    for model, estimates in run.results.items():
        for name, estimate in estimates.items():
            if match := POSITION.fullmatch(name):
                kind, row = "by_position", [int(match[1]), int(match[2])]
            elif match := NEEDLE.fullmatch(name):
                kind, row = "by_depth", [match[1], int(match[2]), float(match[3])]
            elif match := re.fullmatch(r"(.+)@(\d+)", name):
                kind, row = "by_length", [match[1], int(match[2])]
            else:
                kind, row = "benchmarks", [name]
            numbers = [value if value is None or math.isfinite(value) else None for value in estimate]
            found[f"tables/{kind}"][1].append([model, *row, *numbers])
    return {key: table for key, table in found.items() if table[1]}


def _coverage(file: Path) -> list[list[float]]:
    """Of bins of distances: the first and the last, the mean probability, and the share of the pairs."""
    if not file.is_file():
        return []
    columns = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2).T
    bins = zip(*(np.array_split(column, min(MAX_BINS, len(column))) for column in columns), strict=True)
    return [[int(d[0]), int(d[-1]), float(p.mean()), float(pairs.sum())] for d, p, pairs in bins]


def _figures(run: Finished) -> dict[str, Path]:
    """The run's plots by key; a report removes those of an earlier one that it has no data for."""
    files = {f"figures/{name}": run.folder / "plots" / f"{name}.png" for name in FIGURES}
    return {key: png for key, png in files.items() if png.is_file()}


def _prefix(model: str) -> str:
    return "eval/" if model == "extended" else f"eval/{model}/"


def _to_wandb(logger: WandbLogger, run: Finished):
    import wandb

    logger.log_hyperparams(dict(run.settings))  # once more: training may have found the micro-batch
    experiment: Any = logger.experiment
    for over, rows in curves(run.results).items():
        for name in dict.fromkeys(name for row in rows.values() for name in row):
            experiment.define_metric(name, step_metric=over, summary="none")  # the summary has each length's own
        for at, row in rows.items():
            experiment.log({over: at} | row)
    shown: dict[str, Any] = {
        key: wandb.Table(columns=[*columns], data=rows) for key, (columns, rows) in tables(run).items()
    }
    shown |= {key: wandb.Image(str(png)) for key, png in _figures(run).items()}
    logger.log_metrics(summary(run) | shown, run.step)
    results = wandb.Artifact(f"results-{experiment.id}", type="results", metadata=_first_class(run))
    for name in FILES:
        file = run.folder / ("model/README.md" if name == "README.md" else name)
        if file.is_file():
            results.add_file(str(file), name)
    experiment.log_artifact(results)
    if run.with_weights:
        weights = wandb.Artifact(f"model-{experiment.id}", type="model", metadata=_first_class(run))
        weights.add_dir(str(run.folder / "model"), policy="immutable")  # no copy of what may be many gigabytes
        experiment.log_artifact(weights)


def _to_tensorboard(logger: TensorBoardLogger, run: Finished):
    from matplotlib.image import imread

    for key, png in _figures(run).items():
        logger.experiment.add_image(key, imread(png)[..., :3], run.step, dataformats="HWC")
    found = summary(run)
    compared = {name: value for name, value in found.items() if "/window/" in name or "/target/" in name}
    compared |= {name: found[name] for name in ("cost/seconds", "cost/tokens") if name in found}
    logger.log_metrics({name: value for name, value in found.items() if name not in compared}, run.step)
    logger.log_hyperparams(dict(run.settings), compared, run.step)


def _first_class(run: Finished) -> dict[str, Any]:
    return {name: value for name, value in run.settings.items() if name != "cfg"}
