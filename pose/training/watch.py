"""Evaluation while a model trains: curves over the steps, the model of the best step, a gate on short texts."""

import contextlib
import difflib
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch

from pose.errors import CheckpointError, ConfigError
from pose.evaluation.suite import Suite, values
from pose.evaluation.task import Metric, describe, shown
from pose.files import load_json, write_json
from pose.modeling.shard import with_root
from pose.training.callbacks import Export, Throughput
from pose.training.module import PoseModule
from pose.training.options import WatchOptions

log = logging.getLogger(__name__)

BEST_FILE = "pose_best.json"  # in RUN/best: which metric, its value, the step


def check_best(options: WatchOptions, suite: Suite):
    """Whether the metric of `best` is measured, and can be better or worse.

    Raises:
        ConfigError: it is not; names those that are.
    """
    if options.best is None:
        return
    metrics = suite.metrics()
    if options.best not in metrics:
        names = [name for name in metrics if not ("/" in name.partition("@")[2] or name.startswith("position_ppl"))]
        close = [name for name in difflib.get_close_matches(options.best, metrics) if name not in names]
        raise ConfigError(f"watch.best={options.best!r} is not measured: choose from {', '.join([*names, *close])}")
    if metrics[options.best].higher_is_better is None:
        raise ConfigError(
            f"watch.best={options.best!r} cannot be chosen: its definition does not say whether higher is better"
        )


class Watch(L.Callback):
    """Measures the model every so many optimizer steps, before the first and after the last.

    Every process runs the same passes, since each may hold a part of the weights, and goes by what process 0 found.
    The metrics of the model after k steps are logged as val/NAME at step k - 1, as Lightning logs the loss of step k.

    Args:
        suite: what is measured.
        every_n_steps: optimizer steps from one measurement to the next.
        before: whether to measure before the first step.
        short: perplexity at the model's own window alone; None where there is no untuned model to compare with.
        max_short_increase: a share; a perplexity of `short` further than this above the untuned model's gives a
            warning when it has stopped falling or the training ends, and another when it has risen by as much again.
            None gives none.
        best: a metric of the suite, by which the model after one of the steps is kept; None keeps none.
        export: to the folder of the best model.
        throughput: whose clock stops meanwhile, and which does not count the memory that it takes.

    Attributes:
        untuned: the perplexity of the untuned model by `short`; to be set before the training.
        found: of the best step, its value and the step; None before there is one.
    """

    def __init__(
        self,
        suite: Suite,
        every_n_steps: int,
        *,
        before: bool = True,
        short: Suite | None = None,
        max_short_increase: float | None = None,
        best: str | None = None,
        export: Export | None = None,
        throughput: Throughput | None = None,
    ):
        self.suite, self.every_n_steps, self.before = suite, every_n_steps, before
        self.short, self.max_short_increase = short, max_short_increase
        self.best, self.export, self.throughput = best, export, throughput
        self.untuned: float | None = None
        self.found: dict | None = None
        self._watched: int | None = None  # the step last measured
        self._warned: float | None = None  # the increase last warned of
        self._increase: float | None = None  # the one last seen after a step

    def state_dict(self):
        return {"watched": self._watched, "warned": self._warned, "increase": self._increase}

    def load_state_dict(self, state_dict):
        self._watched, self._warned = state_dict["watched"], state_dict["warned"]
        self._increase = state_dict.get("increase")

    def on_train_start(self, trainer, pl_module):
        if self.best is not None and self._watched is not None:
            # RUN/best itself says what it holds: it may be of a step beyond the checkpoint, which is to come again
            assert self.export is not None
            kept = read_best(self.export.folder) if trainer.is_global_zero else None
            kept = kept if kept is not None and (kept["metric"], kept["under"]) == (self.best, self._under()) else None
            if kept is not None and kept["step"] > trainer.global_step and kept.get("max_steps") != trainer.max_steps:
                log.info(f"RUN/best of step {kept['step']:,} is left: the step comes again with another max_steps")
                kept = None
            self.found = trainer.strategy.broadcast(kept)
        if self._watched is None and self.before:
            self._watch(trainer, pl_module)
        elif self._watched is None:
            self._watched = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = trainer.global_step
        if step not in (0, self._watched) and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._watch(trainer, pl_module)

    def _watch(self, trainer: L.Trainer, pl_module: PoseModule):
        begin, step = time.perf_counter(), trainer.global_step
        with contextlib.nullcontext() if self.throughput is None else self.throughput.paused():
            metrics = self._measure(trainer, pl_module)
            self._watched = step
            line = f"Step {step}: {summary(metrics, self.suite.metrics())}"
            if self.best is not None and step > 0 and self._improves(metrics):
                # The file that says what the folder holds is the last to come: a folder without it counts as none.
                assert self.export is not None
                self.export.save(trainer, pl_module)
                self.found = {"metric": self.best, "value": metrics[self.best], "step": step, "under": self._under(),
                              "max_steps": trainer.max_steps}  # fmt: skip
                if trainer.is_global_zero:
                    write_json(self.export.folder / BEST_FILE, self.found)
                trainer.strategy.barrier("best model")
                line += f"; {self.best} is the best so far"
        log.info(f"{line} ({time.perf_counter() - begin:.1f} s)")
        if (increase := metrics.get("short_ppl_increase")) is not None:
            self._warn(step, increase, is_last=step == trainer.max_steps)
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in metrics.items()}, step=step - 1)

    def _measure(self, trainer: L.Trainer, pl_module: PoseModule) -> dict[str, float]:
        """The metrics of the model as it trains, in the precision it trains in; the same in every process."""
        model, training = pl_module.model, pl_module.model.training
        try:
            eager = torch.compiler.set_stance("force_eager")  # a text's length would be another shape
            with torch.no_grad(), trainer.precision_plugin.forward_context(), eager:
                metrics = with_root(model, self._run, model)
        finally:
            model.train(training)
        return trainer.strategy.broadcast(metrics)

    def _run(self, model) -> dict[str, float]:
        metrics = values(self.suite.run(model, progress=False))
        if self.untuned is not None and self.short is not None:
            metrics["short_ppl_increase"] = short_perplexity(self.short, model) / self.untuned - 1
        return metrics

    def _improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether the best metric is a number, and better than any before: of equal ones the first is kept."""
        assert self.best is not None
        metric = self.suite.metrics().get(self.best) or describe(self.best)
        sign = 1 if metric.higher_is_better else -1
        value = sign * metrics[self.best]
        return value > (-math.inf if self.found is None else sign * self.found["value"])

    def _warn(self, step: int, increase: float, is_last: bool):
        """Not of what rescaling alone has done, before the first step, nor while training takes it back."""
        if step == 0:
            return
        falls = self._increase is None or increase < self._increase
        limit, self._increase = self.max_short_increase, increase
        if limit is None or increase <= limit + (self._warned or 0.0) or (falls and not is_last):
            return
        self._warned = increase
        assert self.short is not None and self.untuned is not None
        log.warning(short_warning(self.short.lengths[0], f"at step {step}", self.untuned, increase, limit))

    def _under(self) -> str:
        """What a value of the best metric depends on besides the model, as a digest."""
        units = [[task.name, task.units()] for task in self.suite.tasks]
        return hashlib.sha256(json.dumps(units, sort_keys=True).encode()).hexdigest()[:16]


def summary(metrics: Mapping[str, float], described: Mapping[str, Metric] | None = None) -> str:
    """The metrics in one line, without those that say much the same, or in more detail.

    Args:
        metrics: values by name.
        described: what the tasks say of them.
    """
    parts = []
    for name, value in metrics.items():
        family, _, length = name.partition("@")
        if family in ("position_ppl", "bits_per_byte") or "/" in length or f"tail_{name}" in metrics:
            continue
        if name == "short_ppl_increase":
            parts.append(f"perplexity of short texts {value:+.1%}")
        else:
            parts.append(f"{name} {shown(name, value, described)}")
    return ", ".join(parts)


def short_perplexity(short: Suite, model) -> float:
    """Perplexity at the model's own window.

    Args:
        short: of that one length, perplexity alone.
        model: in whatever mode; left in eval mode.
    """
    return values(short.run(model, progress=False))[f"ppl@{short.lengths[0]}"]


def short_warning(window: int, when: str, untuned: float, increase: float, limit: float) -> str:
    """What is said of short texts that have become harder.

    Args:
        window: the model's own, in tokens.
        when: such as "at step 100".
        untuned: perplexity before training.
        increase: of it, as a share.
        limit: the share that is accepted.
    """
    return (
        f"perplexity at the model's own window of {window} tokens is {untuned * (1 + increase):.2f} {when}, "
        f"{increase:.1%} above the untuned model's {untuned:.2f} (watch.max_short_increase={limit:g}). What helps: "
        "more steps (trainer.max_steps) while it still falls, a lower finetune.lr, another rope, or staying near the "
        "original model on short texts (objective=long_short)"
    )


def read_best(folder: Path) -> dict | None:
    """What the folder of the best model says it holds: metric, value, step, under; None where it says nothing."""
    file = folder / BEST_FILE
    if not file.exists():
        return None
    try:
        return load_json(file, CheckpointError, {"metric": str, "value": (int, float), "step": int, "under": str})
    except CheckpointError as error:
        log.warning(f"{error}: the best model there is ignored")
        return None
