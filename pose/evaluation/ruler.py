"""RULER (arXiv 2404.06654): its synthetic tasks on base-model prompts, and its score, which reciting does not raise.

python -m pose.evaluation.ruler tokenizer=FOLDER task=TASK length=N num=K out=FILE.jsonl
    [seed=0] [depth=D] [haystack=FILE] [add_bos=false]

writes K prompts, one JSON object a line: prompt, answers, length, depths, task, index. No model is needed.
docs/RULER.md compares parameters and scoring with the public definition.
"""

import hashlib
import json
import os
import re
import runpy
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError
from pose.evaluation.generation import end_ids, greedy
from pose.evaluation.options import BOOK
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import Estimate, Task, ratio, wilson
from pose.tasks.haystack import words_digest
from pose.tasks.ruler import NEEDLES, TASKS, TOKENS_TO_GENERATE, RulerPrompt, RulerPrompts

__all__ = ["TASKS", "Ruler", "score", "write_prompts"]

LEAD = 100  # characters of the prompt before an answer that make it a recital, for needles
RECITAL = 50  # characters of the prompt that are a recital, for answers from many places

_CONTROL = re.compile(r"[\x00-\x1f]")


class Ruler(Task):
    """One of RULER's tasks; a length is a unit.

    Metrics: ruler/TASK@N for each N, tokens of the prompt: the mean over prompts of the share of answers found.

    Args:
        task: one of TASKS.
        tokenizer: the models'.
        haystack: the text that needles lie in, where the task has one.
        lengths: the N.
        trials: prompts per length.
        seed: of everything that is drawn.
        depths: of needles, in [0, 1], as in `RulerPrompts.sample`; None draws them. vt, cwe and fwe have none.
        bos_id: put before each prompt, and counted in its length, when given.

    Raises:
        ConfigError: an unknown task, an empty haystack, or a length that is too short; names the shortest.
    """

    def __init__(
        self,
        task: str,
        tokenizer,
        haystack: str,
        lengths: Sequence[int],
        *,
        trials: int,
        seed: int,
        depths: Sequence[float] | None = None,
        bos_id: int | None = None,
    ):
        self.task, self.name, self.tokenizer = task, f"ruler/{task}", tokenizer
        self.lengths, self.trials, self.seed = sorted(set(lengths)), trials, seed
        self.depths = None if depths is None or task not in NEEDLES else list(depths)
        self.bos = [] if bos_id is None else [bos_id]
        self.haystack_digest = hashlib.sha256(haystack.encode()).hexdigest()
        self.prompts = RulerPrompts(task, tokenizer, haystack, depths=self.depths, num_added=len(self.bos))
        try:
            for length in self.lengths:
                self.prompts.check(seed, length, trials)
        except ConfigError as error:
            raise ConfigError(f"{error}; give more, in eval.lengths") from error

    def units(self) -> dict[str, dict[str, Any]]:
        depends = {
            "trials": self.trials, "seed": self.seed, "depths": self.depths, "bos": self.bos,
            "tokenizer": tokenizer_digest(self.tokenizer), "haystack": self.haystack_digest,
            "words": None if self.task in ("vt", "fwe") else words_digest(),
        }  # fmt: skip
        return {str(length): {"length": length, **depends} for length in self.lengths}

    def measure(self, scorer: Scorer, unit: str) -> dict[str, list]:
        """By prompt: `scores` in [0, 1], `predictions` (what was written), `answers`, and `depths` of the needles."""
        prompts = [self.prompts.sample(self.seed, int(unit), trial) for trial in range(self.trials)]
        ends, predictions = end_ids(scorer.model, self.tokenizer), []
        for batch in scorer.batches(self._ids(prompt, int(unit)) for prompt in prompts):
            for row in greedy(scorer.model, batch, TOKENS_TO_GENERATE[self.task], ends):
                predictions.append(self.tokenizer.decode(row, skip_special_tokens=True))
        return {
            "scores": [
                score(self.task, prediction, prompt.answers, prompt.text)
                for prediction, prompt in zip(predictions, prompts, strict=True)
            ],
            "predictions": predictions,
            "answers": [prompt.answers for prompt in prompts],
            "depths": [prompt.depths for prompt in prompts],
        }

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        return {
            f"{self.name}@{n}": wilson(sum(scores), len(scores))
            if set(scores) <= {0, 1}  # where they all are one of these a bootstrap would be sure of it
            else ratio(scores, [1] * len(scores))
            for n, scores in ((n, outcome["scores"]) for n, outcome in outcomes.items())
        }

    def _ids(self, prompt: RulerPrompt, length: int) -> np.ndarray:
        ids = np.array(self.bos + self.prompts.texts.ids(prompt.text), np.int64)
        assert len(ids) == length
        return ids


def score(task: str, prediction: str, answers: Sequence[str], prompt: str) -> float:
    """RULER's string_match_all of one prediction, in which what is recited from the prompt does not count.

    As in RULER, an answer is found where it occurs in the prediction, in any case. Not counted, with white space and
    case aside:

    * niah: an occurrence whose LEAD characters before it stand with it in the prompt. To copy the needle's own sentence
      is to find it; to arrive there by reciting is not. (No needle stands in the first LEAD characters of a prompt.)
    * vt, cwe, fwe, whose answers stand in many places: an occurrence inside RECITAL or more characters of the prompt.

    Args:
        task: one of TASKS.
        prediction: what was written after the prompt.
        answers: all that are asked for.
        prompt: its text.

    Returns:
        The share of the answers that are found.
    """
    said = _plain(_CONTROL.sub("\n", prediction.strip()))
    given = _plain(prompt)
    recited = np.zeros(len(said) + 1, np.int64)
    if task not in NEEDLES:
        recited[1:] = np.cumsum(_recited(said, given))
    found = 0
    for answer in map(_plain, answers):
        for match in re.finditer(f"(?={re.escape(answer)})", said):
            begin, end = match.start(), match.start() + len(answer)
            if task in NEEDLES:
                lead = said[max(begin - LEAD, 0) : end]
                is_recital = begin >= LEAD and lead in given
            else:
                is_recital = recited[end] - recited[begin] == end - begin
            if not is_recital:
                found += 1
                break
    return found / len(answers)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _recited(said: str, given: str) -> np.ndarray:
    """Which characters lie in a stretch of RECITAL or more that stands in the prompt; bool [len(said)]."""
    marks = np.zeros(len(said), bool)
    begin = 0
    while begin + RECITAL <= len(said):
        place = given.find(said[begin : begin + RECITAL])
        if place < 0:
            begin += 1
            continue
        goes_on = takewhile(lambda pair: pair[0] == pair[1], zip(said[begin:], given[place:], strict=False))
        length = sum(1 for _ in goes_on)
        marks[begin : begin + length] = True
        begin += length - RECITAL + 1
    return marks


def write_prompts(
    path: str | Path,
    task: str,
    tokenizer,
    haystack: str,
    length: int,
    num: int,
    *,
    seed: int = 0,
    depth: float | None = None,
    add_bos: bool = False,
):
    """Writes prompts 0 to num - 1 as JSON lines, in one step.

    Args:
        path: of the file; its folder is made.
        task: one of TASKS.
        tokenizer: a transformers tokenizer.
        haystack: the text that needles lie in.
        length: tokens of each prompt.
        num: prompts.
        seed: of everything that is drawn.
        depth: of the needle that is asked for, in [0, 1]; None draws it.
        add_bos: whether a BOS, which the file does not have, is counted in the length.

    Raises:
        ConfigError: an unknown task, a length that is too short, a depth where there are no needles, or a path that
            cannot be written.
    """
    if depth is not None and task in TASKS and task not in NEEDLES:
        raise ConfigError(f"depth={depth} does not go with task={task}, which has no needles: leave it out")
    depths = None if depth is None else [depth]
    prompts = RulerPrompts(task, tokenizer, haystack, depths=depths, num_added=int(add_bos))
    prompts.check(seed, length, num)
    path = Path(path).expanduser()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise ConfigError(f"out={path} cannot be written ({error}): give a file, such as prompts.jsonl") from error
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            for index in range(num):
                prompt = prompts.sample(seed, length, index)
                record = {
                    "prompt": prompt.text, "answers": prompt.answers, "length": length, "depths": prompt.depths,
                    "task": task, "index": index,
                }  # fmt: skip
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


NEEDED = ("tokenizer", "task", "length", "num", "out")
DEFAULTS = {"seed": "0", "depth": "null", "haystack": BOOK, "add_bos": "false"}


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of the command, key=value each, by key.

    Raises:
        ConfigError: an unknown or missing key, or a value that is not accepted.
    """
    given: dict[str, Any] = dict(DEFAULTS)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in (*NEEDED, *DEFAULTS):
            raise ConfigError(f"{argument!r} is not known: give key=value with {', '.join((*NEEDED, *DEFAULTS))}")
        given[name] = value
    missing = [f"{name}=..." for name in NEEDED if not given.get(name)]
    if missing:
        raise ConfigError(f"{' '.join(missing)} must be given too, as in\n{__doc__.split(chr(10) * 2)[1]}")
    for name, least in (("length", 1), ("num", 1), ("seed", 0)):
        if not given[name].isdecimal() or int(given[name]) < least:
            raise ConfigError(f"{name}={given[name]} is not accepted: give an integer of at least {least}")
        given[name] = int(given[name])
    if given["add_bos"] not in ("true", "false"):
        raise ConfigError(f"add_bos={given['add_bos']} is not accepted: give true or false")
    given["add_bos"] = given["add_bos"] == "true"
    if given["depth"] == "null":
        given["depth"] = None
    else:
        try:
            depth = float(given["depth"])
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise ConfigError(f"depth={given['depth']} is not accepted: give a place from 0 to 1")
        given["depth"] = depth
    return given


if __name__ == "__main__":
    runpy.run_module("pose.app.ruler", run_name="__main__")
