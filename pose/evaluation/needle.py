"""The needle in a haystack over length and depth; teacher-forced. Its prompts: `pose.tasks.needle`."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pose.data.tokenizer import tokenizer_digest
from pose.evaluation.passkey import found
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import Estimate, Metric, TaskByLength, are_verdicts, describe, wilson
from pose.tasks.haystack import words_digest
from pose.tasks.needle import NeedlePrompts


class Needle(TaskByLength):
    """The share of prompts whose number is written by greedy decoding, and no digit more; a length is a unit.

    The verdict is that of the passkey, `pose.evaluation.passkey.found`.

    Metrics: needle@N for each N, tokens of prompt and number together; needle@N/D for each depth D.

    Args:
        tokenizer: the models'.
        haystack: the text.
        lengths: the N.
        depths: places in the haystack, as in `NeedlePrompts.sample`.
        trials: prompts per length and depth.
        seed: of keys, numbers and where the text begins.
        bos_id: put before each prompt, and counted in its length, when given.

    Raises:
        ConfigError: an empty haystack, or a length that is too short; names the shortest.
    """

    name = "needle"

    def __init__(
        self,
        tokenizer,
        haystack: str,
        lengths: Sequence[int],
        *,
        depths: Sequence[float],
        trials: int,
        seed: int,
        bos_id: int | None = None,
    ):
        super().__init__(lengths)
        self.depths, self.trials = sorted({float(depth) + 0.0 for depth in depths}), trials  # -0.0 is 0
        self.prompts = NeedlePrompts(tokenizer, haystack, seed=seed, bos_id=bos_id)
        self.haystack_digest = hashlib.sha256(haystack.encode()).hexdigest()
        for length in self.lengths:
            self.prompts.check(length, self.depths, trials)

    def metrics(self) -> dict[str, Metric]:
        names = [
            f"needle@{n}{depth}" for n in self.lengths for depth in ("", *(f"/{d}" for d in map(exactly, self.depths)))
        ]
        return {name: describe(name) for name in names}

    def depends(self) -> dict[str, Any]:
        return {
            "depths": self.depths, "trials": self.trials, "seed": self.prompts.seed, "bos": self.prompts.bos,
            "tokenizer": tokenizer_digest(self.prompts.tokenizer), "haystack": self.haystack_digest,
            "words": words_digest(), "end": self.prompts.tokenizer.eos_token_id,
        }  # fmt: skip

    def measure(self, scorer: Scorer, unit: str) -> dict[str, list[int]]:
        """By depth (`exactly`): 0 or 1 for each trial."""
        prompts = [
            self.prompts.sample(int(unit), depth, trial) for depth in self.depths for trial in range(self.trials)
        ]
        verdicts = np.array(found(scorer, self.prompts.tokenizer, prompts), int).reshape(len(self.depths), self.trials)
        return {exactly(depth): row.tolist() for depth, row in zip(self.depths, verdicts, strict=True)}

    def accepts(self, unit: str, outcome: Any) -> bool:
        return list(outcome) == [*map(exactly, self.depths)] and all(
            are_verdicts(row, self.trials) for row in outcome.values()
        )

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        estimates = {}
        for n, by_depth in outcomes.items():
            estimates[f"needle@{n}"] = wilson(sum(map(sum, by_depth.values())), sum(map(len, by_depth.values())))
            for depth, row in by_depth.items():
                estimates[f"needle@{n}/{depth}"] = wilson(sum(row), len(row))
        return estimates


def exactly(depth: float) -> str:
    """A depth in its shortest decimal form, which no other depth has: 0.5, 1, 0.3333333333333333, 0.0000001."""
    return np.format_float_positional(depth, trim="-")
