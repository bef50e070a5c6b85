"""Standard benchmarks through lm-evaluation-harness: its tasks by name, or task YAMLs of one's own."""

import difflib
import glob
import hashlib
import io
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import huggingface_hub
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError, DataError
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import NORMAL_95, Estimate, Task
from pose.modeling.checkpoints.hub import hub_answers

log = logging.getLogger(__name__)

# As the PoSE paper has them (Zhu et al. 2024, arXiv 2309.10400, Table 3), after the Open LLM Leaderboard.
FEWSHOT = {"arc_challenge": 25, "hellaswag": 10, "boolq": 0, "piqa": 0, "winogrande": 0, "truthfulqa_mc2": 0}
NORMALISED = ("arc_challenge", "hellaswag")  # their score is acc_norm: log-probability over the answer's characters
PROPORTIONS = ("acc", "acc_norm", "exact_match", "em", "f1")  # whose intervals end at 0 and 1
BOOTSTRAP = 1000  # resamples, for metrics whose standard error has no closed form


class Harness(Task):
    """A task of lm-evaluation-harness, or a group of tasks that has a score of its own; it is one unit.

    Metric: harness/TASK, which is acc_norm for arc_challenge and hellaswag, else the task's acc, and its first metric
    where it has none; the interval is 1.96 standard errors as lm-eval gives them. Outcomes have all metrics.

    Args:
        task: its name there.
        tokenizer: of the models.
        num_fewshot: examples before each question; None takes FEWSHOT, and for other tasks their own number. Tasks that
            fix 0 in their definition stay at 0.
        limit: the first so many questions (of each task of a group); None takes all.
        include_path: folder with task YAMLs, which come before lm-eval's own of the same name.
        seed: draws the examples.
        max_length: tokens in a request; longer ones lose their beginning, and are counted and reported.

    Raises:
        ConfigError: lm-eval is missing, an unknown task, or one that cannot be run here; names it, and close matches.
    """

    def __init__(
        self,
        task: str,
        tokenizer,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        include_path: str | None = None,
        seed: int = 0,
        max_length: int,
    ):
        self.task, self.name, self.tokenizer = task, f"harness/{task}", tokenizer
        self.num_fewshot = FEWSHOT.get(task) if num_fewshot is None else num_fewshot
        self.limit, self.seed, self.max_length = limit, seed, max_length
        self._prepared = None
        self.include_path = None if include_path is None else str(Path(include_path).expanduser())
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"eval.include_path={include_path} is no folder: give one with task YAMLs")
        self.manager = _task_manager(self.include_path, _folder_digest(self.include_path))
        self._check_name()
        self.configs = list(_task_configs(self.manager.task_index, task))
        for config in self.configs:
            if config.get("unsafe_code"):
                raise ConfigError(f"eval.tasks has {task}, which runs code that a model writes: never done here")
            if config.get("doc_to_image") or config.get("doc_to_audio"):
                raise ConfigError(f"eval.tasks has {task}, which asks about images or sound: the models here read text")

    def _check_name(self):
        index = self.manager.task_index
        if self.task not in index:
            close = difflib.get_close_matches(self.task, index, 5) or [name for name in index if self.task in name][:5]
            raise ConfigError(
                f"eval.tasks has {self.task!r}, which lm-eval {version('lm_eval')} does not know: "
                + (f"close are {', '.join(close)}" if close else "lm-eval ls tasks prints the names")
                + (" (tasks of your own: eval.include_path=FOLDER)" if self.include_path is None else "")
            )
        entry = index[self.task]
        is_tag = entry.kind.name == "TAG"
        if is_tag or (entry.kind.name == "GROUP" and not entry.cfg.get("aggregate_metric_list")):
            members = sorted(entry.tags) if is_tag else [_member_name(member) for member in entry.cfg["task"]]
            shown = ",".join(members[:20]) + (",..." if len(members) > 20 else "")
            raise ConfigError(f"eval.tasks has {self.task}, a set of tasks without a score of its own: give [{shown}]")

    def units(self) -> dict[str, dict[str, Any]]:
        """One unit. A dataset of the hub is what its main branch held when it was measured."""
        return {
            self.task: {
                "lm_eval": version("lm_eval"), "num_fewshot": self.num_fewshot, "limit": self.limit, "seed": self.seed,
                "max_length": self.max_length, "tokenizer": tokenizer_digest(self.tokenizer),
                "include_path": _folder_digest(self.include_path), "data_files": _local_data(self.configs),
            }
        }  # fmt: skip

    def prepare(self):
        """Loads the questions. Raises as `measure`."""
        self._prepared = self._load()

    def measure(self, scorer: Scorer, unit: str) -> dict[str, Any]:
        """What lm-eval reports.

        Returns:
            metrics: by name (as acc,none: metric and filter) value and stderr, which may be None.
            members: the same of each task of a group.
            versions, num_fewshot: by task. num: questions. requests, truncated: counts.

        Raises:
            DataError: the questions cannot be loaded.
            ConfigError: a package that the task needs is missing, or it does not fit the window.
        """
        import lm_eval

        from pose.evaluation.hflm import ScorerLM

        terminal = sys.stderr
        found, self._prepared = self._prepared or self._load(), None
        with _surroundings(self.seed):
            fixed = []
            for name, task in found["tasks"].items():
                if task.get_config("num_fewshot") == 0 and self.num_fewshot:
                    fixed.append(name)
                elif self.num_fewshot is not None:
                    task.set_config("num_fewshot", self.num_fewshot)
                elif task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(self.seed)
            model = ScorerLM(scorer, self.tokenizer, self.max_length, self.task, terminal)
            with _hub_code_refused(self.name):
                results = lm_eval.evaluate(model, found, limit=self.limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
        if fixed:
            log.warning(
                f"{self.name}: the definition fixes 0 examples; eval.num_fewshot={self.num_fewshot} is not used"
            )
        if model.num_truncated:
            log.warning(
                f"{self.name}: {model.num_truncated} of {model.num_requests} requests are longer than the window of "
                f"{self.max_length} tokens and lost their beginning"
            )
        metrics = {name: _metrics(values) for name, values in results["results"].items()}
        chosen = self._metric([key.split(",")[0] for key in metrics[self.task]])
        # lm-eval says it of a perplexity
        self.lower_is_better = results["higher_is_better"].get(self.task, {}).get(chosen) is False
        return {
            "metrics": metrics.pop(self.task),
            "members": metrics,
            "versions": {name: results["versions"].get(name) for name in found["tasks"]},
            "num_fewshot": {name: results["n-shot"][name] for name in found["tasks"]},
            "num": sum(samples["effective"] for samples in results["n-samples"].values()),
            "requests": model.num_requests,
            "truncated": model.num_truncated,
        }

    def _metric(self, names: Sequence[str]) -> str:
        wanted = "acc_norm" if self.task in NORMALISED else "acc"
        return wanted if wanted in names else names[0]

    def _load(self):
        try:
            with _surroundings(self.seed), _hub_code_refused(self.name):
                return self.manager.load([self.task])
        except ConfigError:
            raise
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.name} needs the package {error.name}: pip install {error.name}") from error
        except Exception as error:  # whatever datasets and the code of the task raise
            hint = "" if hub_answers() else " (the hub does not answer: have it downloaded where it does)"
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(f"the questions of {self.name} cannot be loaded: {reason}{hint}") from error

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        (outcome,) = outcomes.values()
        by_name: dict[str, Any] = {}
        for key, metric in outcome["metrics"].items():
            by_name.setdefault(key.split(",")[0], metric)  # of several filters the first
        value, stderr = by_name[self._metric(list(by_name))].values()
        bounds = (None, None) if stderr is None else (value - NORMAL_95 * stderr, value + NORMAL_95 * stderr)
        if stderr is not None and self._metric(list(by_name)) in PROPORTIONS:
            bounds = (max(bounds[0], 0.0), min(bounds[1], 1.0))
        return {self.name: Estimate(value, *bounds, outcome["num"])}


@cache
def _task_manager(include_path: str | None, digest: str | None):
    """lm-eval's index of tasks; made once for a folder's content. Takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("eval=harness needs the package lm-eval: pip install lm-eval accelerate") from error
    with _quiet():
        return TaskManager(include_path=include_path)


def _task_configs(index, name: str) -> Iterator[dict[str, Any]]:
    """The configs of a task, or of all tasks of a group, as their YAMLs have them."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _task_configs(index, member)
    elif entry.kind.name == "GROUP":
        for member in entry.cfg["task"]:
            if _member_name(member) in index:
                yield from _task_configs(index, _member_name(member))
            else:
                yield member  # defined inside the group
    else:
        yield entry.cfg or {}


def _member_name(member: str | dict[str, Any]) -> str:
    return member if isinstance(member, str) else member.get("task") or member["group"]


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Value and standard error by name, from one entry of lm-eval's results."""
    metrics = {}
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if chosen and isinstance(value, Real) and not name.endswith("_stderr"):
            stderr = values.get(f"{name}_stderr,{chosen}")
            stderr = float(stderr) if isinstance(stderr, Real) and np.isfinite(stderr) else None
            metrics[key] = {"value": float(value), "stderr": stderr}
    return metrics


def _folder_digest(folder: str | None) -> str | None:
    """SHA-256 over names and content of all files, but for what Python writes beside them."""
    if folder is None:
        return None
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
    return _digest((str(file.relative_to(folder)), file) for file in files)


def _local_data(configs: list[dict[str, Any]]) -> str:
    """SHA-256 of the local files that tasks name as their data."""
    patterns: list[str] = []
    for config in configs:
        options = config.get("dataset_kwargs") or {}
        folders = [folder for folder in (config.get("dataset_path"), options.get("data_dir")) if folder]
        patterns += [*_strings(options.get("data_files")), *(f"{folder}/**" for folder in folders)]
    files = sorted({file for pattern in patterns for file in glob.glob(pattern, recursive=True)})
    return _digest((file, Path(file)) for file in files if Path(file).is_file())


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _digest(files) -> str:
    total = hashlib.sha256()
    for name, file in files:
        total.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return total.hexdigest()


@contextmanager
def _surroundings(seed: int):
    """Where lm-eval runs: seeded, quiet, and not waiting for a hub that does not answer.

    The state of the random generators is afterwards what it was.
    """
    import datasets

    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        stack.enter_context(_quiet())
        stack.enter_context(patch.dict(os.environ, DISABLE_MULTIPROC="1"))  # lm-eval's bootstrap forks for each core
        if not hub_answers():  # which the libraries would ask for half a minute, dataset by dataset, cached or not
            stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        yield


@contextmanager
def _quiet():
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
def _hub_code_refused(name: str):
    """The metrics of the package evaluate are programs on the hub; `datasets` has not run such code since version 4.

    An empty package takes its place, which the script evaluate.py would do else, when it runs.

    Raises:
        ConfigError: the task uses one; names both.
    """
    refused = []

    def refuse(path, *args, **kwargs):
        refused.append(path)
        raise ConfigError(f"{name} takes its metric {path} from the hub, which is a program, and such are never run")

    own, stand_in = sys.modules.get("evaluate"), ModuleType("evaluate")
    stand_in.load = refuse
    sys.modules["evaluate"] = stand_in
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if own is not None:
            sys.modules["evaluate"] = own
        if refused:  # lm-eval may have caught it, and gone on without the metric
            refuse(refused[0])
