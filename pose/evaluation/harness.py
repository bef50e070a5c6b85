"""Standard benchmarks through lm-evaluation-harness: its tasks by name, or your own task YAMLs."""

import glob
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError, DataError
from pose.evaluation.lmeval import BOOTSTRAP, Definitions, hub_code_refused, reported, surroundings
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import ACCURACY, NORMAL_95, SCORE, Estimate, Metric, Task, are_numbers
from pose.files import sha256
from pose.modeling.checkpoints.hub import hub_answers

log = logging.getLogger(__name__)

# As the PoSE paper has them (Zhu et al. 2024, arXiv 2309.10400, Table 3), after the Open LLM Leaderboard.
FEWSHOT = {"arc_challenge": 25, "hellaswag": 10, "boolq": 0, "piqa": 0, "winogrande": 0, "truthfulqa_mc2": 0}
NORMALISED = ("arc_challenge", "hellaswag")  # their score is acc_norm: log-probability over the answer's characters
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "acc_all", "exact_match", "em", "f1")  # in [0, 1]


class Harness(Task):
    """A task of lm-evaluation-harness, or a group of tasks that has a score of its own; it is one unit.

    Metric: harness/TASK, which is acc_norm for arc_challenge and hellaswag, else the task's acc, and the first metric
    of its definition where it has none; the interval is 1.96 standard errors as lm-eval gives them. Outcomes have all
    metrics.

    Args:
        task: its name there.
        tokenizer: of the models.
        num_fewshot: examples before each question; None takes FEWSHOT, and for other tasks their own number. Tasks that
            fix 0 in their definition stay at 0.
        limit: the first so many questions (of each task of a group); None takes all.
        include_path: folder with task YAMLs, which come before lm-eval's own of the same name. Their code runs.
        seed: draws the examples.
        max_length: tokens in a request; longer ones lose their beginning, and are counted and reported.

    Raises:
        ConfigError: lm-eval is missing, an unknown task, or one that cannot be run here; names it, and close matches.
        DataError: a file in include_path, or of the questions, cannot be read.
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
        self._prepared: dict[str, Any] | None = None
        self.include_path = None if include_path is None else str(Path(include_path).expanduser())
        self.definitions = Definitions(self.include_path, _folder_digest(self.include_path))
        hint = " (tasks of your own: {group}.include_path=FOLDER)" if include_path is None else ""
        self.definitions.check(task, hint)
        self.configs = list(self.definitions.configs(task))
        self.declared = self.definitions.metrics(task)
        for config in self.configs:
            self._check(config)

    def _check(self, config: Mapping[str, Any]):
        reason = None
        if config.get("unsafe_code"):
            reason = "runs code that a model writes: never done here"
        elif config.get("doc_to_image") or config.get("doc_to_audio"):
            reason = "asks about images or sound: the models here read text"
        elif self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None and self._begins_bare(config):
            reason = "scores texts from their first token on, after a BOS or EOS, and this tokenizer has neither"
        if reason is not None:
            raise ConfigError(f"{{group}}.tasks has {self.task}, which {reason}", group="eval")

    def _begins_bare(self, config: Mapping[str, Any]) -> bool:
        """Whether texts are scored from their first token on, with an empty prompt."""
        examples = config.get("num_fewshot") if self.num_fewshot is None else self.num_fewshot
        is_bare = config.get("doc_to_text") == "" and not config.get("description") and not examples
        return config.get("output_type") == "loglikelihood_rolling" or is_bare

    def metrics(self) -> dict[str, Metric]:
        """One metric. Of a task that is a Python class neither direction nor format is known."""
        metric = self._choose(self.declared) if self.declared else None
        known = ACCURACY if metric in SHARES else SCORE
        direction = None if metric is None else self.declared[metric]
        return {self.name: Metric(self.task, direction, known.format)}

    def units(self) -> dict[str, dict[str, Any]]:
        """One unit. A dataset of the hub is what its main branch held when it was measured."""
        return {
            self.task: {
                "lm_eval": version("lm_eval"), "num_fewshot": self.num_fewshot, "limit": self.limit, "seed": self.seed,
                "max_length": self.max_length, "tokenizer": tokenizer_digest(self.tokenizer),
                "special": [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id],
                "include_path": _folder_digest(self.include_path), "configs": self._configs_digest(),
                "data_files": _local_data(self.configs),
            }
        }  # fmt: skip

    def _configs_digest(self) -> str | None:
        """SHA-256 of your own YAMLs with all that they include, which may lie outside their folder."""
        if self.include_path is None:
            return None
        text = json.dumps(self.configs, sort_keys=True, default=str)
        for folder in (str(Path(self.include_path).resolve()), self.include_path):  # wherever it lies
            text = text.replace(json.dumps(folder)[1:-1], "")
        return hashlib.sha256(text.encode()).hexdigest()

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
            ConfigError: a package that the task needs is missing, it does not fit the window, or has no number to show.
        """
        import lm_eval

        from pose.evaluation.hflm import ScorerLM

        terminal = sys.stderr
        found, self._prepared = self._prepared or self._load(), None
        with surroundings(self.seed):
            for task in found["tasks"].values():
                if task.get_config("num_fewshot") == 0 and self.num_fewshot:
                    continue  # its definition fixes that
                if self.num_fewshot is not None:
                    task.set_config("num_fewshot", self.num_fewshot)
                elif task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(self.seed)
            model = ScorerLM(scorer, self.tokenizer, self.max_length, self.task, terminal)
            with hub_code_refused(self.name):
                results = lm_eval.evaluate(model, found, limit=self.limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
        metrics = {name: reported(values) for name, values in results["results"].items()}
        if not metrics.get(self.task):
            raise ConfigError(f"{self.name} has no metric that is a number: lm-eval reports none")
        return {
            "metrics": metrics.pop(self.task),
            "members": metrics,
            "versions": {name: results["versions"].get(name) for name in found["tasks"]},
            "num_fewshot": {name: results["n-shot"][name] for name in found["tasks"]},
            "num": sum(samples["effective"] for samples in results["n-samples"].values()),
            "requests": model.num_requests,
            "truncated": model.num_truncated,
        }

    def _choose(self, names: Iterable[str]) -> str:
        """The metric that is shown, of those that are declared or reported."""
        names = list(names)
        wanted = ["acc_norm"] if self.task in NORMALISED else []
        return next(name for name in (*wanted, "acc", *self.declared, *names) if name in names)

    def _load(self) -> dict[str, Any]:
        try:
            with surroundings(self.seed), hub_code_refused(self.name):
                return self.definitions.manager.load([self.task])
        except ConfigError:
            raise
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.name} needs the package {error.name}: pip install {error.name}") from error
        except Exception as error:  # datasets and the code of the task raise errors of any class
            hint = "" if hub_answers() else " (the hub does not answer: have it downloaded where it does)"
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(f"the questions of {self.name} cannot be loaded: {reason}{hint}") from error

    def accepts(self, unit: str, outcome: Any) -> bool:
        metrics = outcome["metrics"]
        return bool(metrics) and type(outcome["num"]) is int and all(
            are_numbers([metric["value"]]) and (metric["stderr"] is None or are_numbers([metric["stderr"]]))
            for metric in metrics.values()
        )  # fmt: skip

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        (outcome,) = outcomes.values()
        if self.num_fewshot and 0 in outcome.get("num_fewshot", {}).values():
            log.warning(f"{self.name}: the definition fixes 0 examples; num_fewshot={self.num_fewshot} is not used")
        if outcome.get("truncated"):
            log.warning(
                f"{self.name}: {outcome['truncated']} of {outcome['requests']} requests are longer than the window of "
                f"{self.max_length} tokens and lost their beginning"
            )
        by_name: dict[str, Any] = {}
        for key, metric in outcome["metrics"].items():
            by_name.setdefault(key.split(",")[0], metric)  # of several filters the first
        name = self._choose(by_name)
        value, stderr = by_name[name]["value"], by_name[name]["stderr"]
        if stderr is None:
            return {self.name: Estimate(value, num=outcome["num"])}
        low, high = value - NORMAL_95 * stderr, value + NORMAL_95 * stderr
        if name in SHARES and 0 <= value <= 1:
            low, high = max(low, 0.0), min(high, 1.0)
        return {self.name: Estimate(value, low, high, outcome["num"])}


def _folder_digest(folder: str | None) -> str | None:
    """SHA-256 over names and content of all files, without Python's __pycache__."""
    if folder is None:
        return None
    files = [file for file in _files_below(folder) if "__pycache__" not in file.parts]
    return _digest((str(file.relative_to(folder)), file) for file in files)


def _local_data(configs: list[dict[str, Any]]) -> str:
    """SHA-256 of the local files that tasks name as their data."""
    patterns: list[str] = []
    files: set[Path] = set()
    for config in configs:
        given = config.get("dataset_kwargs")
        options = given if isinstance(given, Mapping) else {}
        folders = [*_strings(config.get("dataset_path")), *_strings(options.get("data_dir"))]
        patterns += _strings(options.get("data_files"))
        files |= {file for folder in folders if folder for file in _files_below(folder)}
    files |= {Path(file) for pattern in patterns for file in glob.glob(pattern, recursive=True)}
    return _digest((str(file), file) for file in sorted(files) if file.is_file())


def _files_below(folder: str) -> list[Path]:
    """The files of a folder, sorted, behind links too; none where it is no folder.

    Raises:
        DataError: a folder in it cannot be read; names it.
    """

    def unreadable(error: OSError):
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{error.filename} cannot be read: {error.strerror or error}") from error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link back
            folders.clear()
            continue
        seen.add(real)
        found += [file for file in (Path(place, name) for name in names) if file.is_file()]
    return sorted(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Iterable):
        for item in value:
            yield from _strings(item)


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    """Raises DataError where a file cannot be read; names it."""
    total = hashlib.sha256()
    for name, file in files:
        try:
            total.update(f"{name}\0{sha256(file)}\0".encode())
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()
