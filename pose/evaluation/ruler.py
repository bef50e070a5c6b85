"""RULER (arXiv 2404.06654): its synthetic tasks on base-model prompts, and its score, which reciting does not raise.

The prompts are `pose.tasks.ruler`'s; `python -m pose.evaluation.ruler` (`pose.app.ruler`) writes them without a model.
docs/RULER.md compares parameters and scoring with the public definition.
"""

if __name__ == "__main__":  # before what takes seconds to import
    import runpy

    runpy.run_module("pose.app.ruler", run_name="__main__")
    raise SystemExit

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError
from pose.evaluation.generation import write
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import (
    Estimate,
    Metric,
    TaskByLength,
    are_numbers,
    are_shares,
    describe,
    wilson,
)
from pose.tasks.haystack import words_digest
from pose.tasks.ruler import NEEDLES, TOKENS_TO_GENERATE, RulerPrompt, RulerPrompts

LEAD = 100  # characters of the prompt before an answer that make it a recital, for needles
RECITAL = 50  # characters of the prompt that are a recital, for answers from many places

_CONTROL = re.compile(r"[\x00-\x1f]")


class Ruler(TaskByLength):
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
        super().__init__(lengths)
        self.task, self.name, self.tokenizer = task, f"ruler/{task}", tokenizer
        self.trials, self.seed = trials, seed
        self.depths = None if depths is None or task not in NEEDLES else list(depths)
        self.bos = [] if bos_id is None else [bos_id]
        self.haystack_digest = hashlib.sha256(haystack.encode()).hexdigest()
        self.prompts = RulerPrompts(
            task, tokenizer, haystack, depths=self.depths, num_added=len(self.bos), key="{group}.tasks"
        )
        try:
            for length in self.lengths:
                self.prompts.check(seed, length, trials)
        except ConfigError as error:
            raise ConfigError(f"{error}; give more, in {{group}}.lengths", group="eval") from error

    def metrics(self) -> dict[str, Metric]:
        return {name: describe(name) for name in (f"{self.name}@{n}" for n in self.lengths)}

    def depends(self) -> dict[str, Any]:
        return {
            "trials": self.trials, "seed": self.seed, "depths": self.depths, "bos": self.bos,
            "tokenizer": tokenizer_digest(self.tokenizer), "haystack": self.haystack_digest,
            "words": None if self.task in ("vt", "fwe") else words_digest(), "end": self.tokenizer.eos_token_id,
        }  # fmt: skip

    def measure(self, scorer: Scorer, unit: str) -> dict[str, list]:
        """By prompt: `scores` in [0, 1], `predictions` (what was written), `answers`, and `depths` of the needles."""
        prompts = [self.prompts.sample(self.seed, int(unit), trial) for trial in range(self.trials)]
        ids = [self._ids(prompt, int(unit)) for prompt in prompts]
        rows = write(scorer, self.tokenizer, ids, TOKENS_TO_GENERATE[self.task])
        predictions = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return {
            "scores": [
                score(self.task, prediction, prompt.answers, prompt.text)
                for prediction, prompt in zip(predictions, prompts, strict=True)
            ],
            "predictions": predictions,
            "answers": [prompt.answers for prompt in prompts],
            "depths": [prompt.depths for prompt in prompts],
        }

    def accepts(self, unit: str, outcome: Any) -> bool:
        texts, answers = outcome["predictions"], outcome["answers"]
        return (
            are_shares(outcome["scores"], self.trials)
            and [type(text) for text in texts] == [str] * self.trials
            and [type(each) for each in answers] == [list] * self.trials
            and [are_numbers(each) for each in outcome["depths"]] == [True] * self.trials
        )

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        return {
            f"{self.name}@{n}": wilson(sum(outcome["scores"]), len(outcome["scores"]))
            for n, outcome in outcomes.items()
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
