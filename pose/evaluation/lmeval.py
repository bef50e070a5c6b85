"""lm-evaluation-harness as this package relies on it: its index of tasks, what it reports, and where it runs.

Every name of lm-eval stands here, or in `pose.evaluation.hflm`, which is the model as lm-eval asks it.
"""

import difflib
import io
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import version
from numbers import Real
from types import ModuleType
from typing import Any
from unittest.mock import patch

import huggingface_hub
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from pose.errors import ConfigError
from pose.modeling.checkpoints.hub import hub_answers

BOOTSTRAP = 1000  # resamples, for metrics whose standard error has no closed form
SHOWN = 20  # names in an error


class Definitions:
    """The tasks that lm-eval knows, and those of a folder; read from YAML, without running anything.

    Args:
        include_path: folder with task YAMLs, which come before lm-eval's own of the same name.
        digest: of what is in it: the index is made once for each.

    Attributes:
        manager: lm-eval's.
        index: its entries by name: a task, a group of tasks with or without a score of its own, or a tag.

    Raises:
        ConfigError: lm-eval is missing.
    """

    def __init__(self, include_path: str | None = None, digest: str | None = None):
        self.manager = _task_manager(include_path, digest)
        self.index = self.manager.task_index

    def check(self, name: str, hint: str):
        """Whether there is a task of a name, or a group that has a score of its own.

        Args:
            name: of the task.
            hint: for the error, where no task is meant by it.

        Raises:
            ConfigError: there is none; names close ones, or the tasks of a set without a score.
        """
        if name not in self.index:
            close = (
                difflib.get_close_matches(name, self.index, 5) or [known for known in self.index if name in known][:5]
            )
            raise ConfigError(
                f"{{group}}.tasks has {name!r}, which lm-eval {version('lm_eval')} does not know: "
                + (f"close are {', '.join(close)}" if close else "lm-eval ls tasks prints the names")
                + hint,
                group="eval",
            )
        entry = self.index[name]
        if entry.kind.name == "TAG" or (entry.kind.name == "GROUP" and not _aggregated(entry.cfg)):
            members = [member for member, _ in self._members(name)]
            names = ",".join(members[:SHOWN]) + (",..." if len(members) > SHOWN else "")
            raise ConfigError(
                f"{{group}}.tasks has {name}, a set of tasks without a score of its own: give [{names}]", group="eval"
            )

    def configs(self, name: str, above: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """The config of a task, or those of all tasks of a group, as their YAMLs have them.

        Args:
            name: of the task.
            above: the groups that it lies in.

        Raises:
            ConfigError: a group that is inside of itself, or whose members are not named.
        """
        if name in above:
            raise ConfigError(f"lm-eval's group {name} is inside of itself: {' > '.join([*above, name])}")
        entry = self.index[name]
        if entry.kind.name not in ("TAG", "GROUP"):
            yield entry.cfg or {}
            return
        for member, overrides in self._members(name):
            if member in self.index:
                yield from ({**config, **overrides} for config in self.configs(member, [*above, name]))
            else:
                yield overrides  # defined inside the group

    def metrics(self, name: str) -> dict[str, bool | None]:
        """The metrics that a definition declares, in its order: whether higher is better, None where it does not say.

        A task that is a Python class declares none.
        """
        if self.index[name].kind.name != "GROUP":
            return _declared(next(self.configs(name)))
        inside: dict[str, bool | None] = {}
        for config in self.configs(name):
            inside = _declared(config) | inside
        names = [str(one["metric"]) for one in _aggregated(self.index[name].cfg) if one.get("metric")]
        return {metric: inside.get(metric, _higher_is_better(metric)) for metric in names}

    def _members(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """The names of a group's or tag's members, and what a group says of each beside its name."""
        entry = self.index[name]
        if entry.kind.name == "TAG":
            return [(member, {}) for member in sorted(entry.tags)]
        members = entry.cfg.get("task")
        found = []
        for member in [members] if isinstance(members, str) else members or []:
            fields = {"task": member} if isinstance(member, str) else member
            key = fields.get("task") or fields.get("group") if isinstance(fields, Mapping) else None
            if not isinstance(key, str):
                raise ConfigError(f"lm-eval's group {name} has a member without a name: {member!r}")
            found.append((key, {} if isinstance(member, str) else dict(fields)))
        return found


@cache
def _task_manager(include_path: str | None, digest: str | None):
    """lm-eval's index of tasks; made once for a folder's content. Takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("eval=harness needs the package lm-eval: pip install lm-eval accelerate") from error
    with quiet():
        return TaskManager(include_path=include_path)


def _aggregated(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a group's own score is made of; none where it has no score."""
    listed = config.get("aggregate_metric_list") or []
    return [one for one in ([listed] if isinstance(listed, Mapping) else listed) if isinstance(one, Mapping)]


def _declared(config: Mapping[str, Any]) -> dict[str, bool | None]:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    if "class" in config:
        return {}
    listed = config.get("metric_list")
    if not isinstance(listed, list):
        listed = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY.get(config.get("output_type"), ())]
    found: dict[str, bool | None] = {}
    for one in listed:
        if isinstance(one, Mapping) and one.get("metric"):
            metric = str(one["metric"])
            if "/" in metric:  # a function, as FILE.NAME
                metric = metric.rpartition(".")[2]
            direction = one.get("higher_is_better", _higher_is_better(metric))
            found[metric] = direction if isinstance(direction, bool) else None
    return found


def _higher_is_better(metric: str) -> bool | None:
    from lm_eval.api.registry import is_higher_better

    with quiet():
        return is_higher_better(metric)


def reported(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Value and standard error by name (as acc,none: metric and filter), from one entry of lm-eval's results."""
    metrics = {}
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if chosen and isinstance(value, Real) and not name.endswith("_stderr"):
            stderr = values.get(f"{name}_stderr,{chosen}")
            error = float(stderr) if isinstance(stderr, Real) else math.nan
            metrics[key] = {"value": float(value), "stderr": error if math.isfinite(error) else None}
    return metrics


@contextmanager
def surroundings(seed: int):
    """Where lm-eval runs: seeded, quiet, and not waiting for a hub that does not answer.

    The state of the random generators is afterwards what it was.
    """
    import datasets

    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        stack.enter_context(quiet())
        stack.enter_context(patch.dict(os.environ, DISABLE_MULTIPROC="1"))  # lm-eval's bootstrap forks for each core
        if not hub_answers():  # the libraries would ask for half a minute for each dataset, cached or not
            stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        yield


@contextmanager
def quiet():
    """lm-eval's messages and bars, of which it has many, go nowhere; errors are raised all the same."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def hub_code_refused(name: str):
    """The metrics of the package evaluate are programs on the hub; `datasets` has not run such code since version 4.

    A stub replaces the package: otherwise `import evaluate` could find this project's evaluate.py.

    Raises:
        ConfigError: the task uses one; names both.
    """
    refused = []

    def refuse(path, *args, **kwargs):
        refused.append(path)
        raise ConfigError(f"{name} takes its metric {path} from the hub, which is a program, and such are never run")

    own, stand_in = sys.modules.get("evaluate"), ModuleType("evaluate")
    vars(stand_in)["load"] = refuse
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if own is not None:
            sys.modules["evaluate"] = own
        if refused:  # raised again: lm-eval may have caught it and gone on without the metric
            refuse(refused[0])
