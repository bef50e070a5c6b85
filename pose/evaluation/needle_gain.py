"""How much the text about a needle helps to answer: what the answer costs with the needle's value swapped, and without.

The prompts are `pose.tasks.needle_gain`'s.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError
from pose.evaluation.needle import exactly
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import Estimate, Metric, TaskByLength, are_numbers, describe, ratio, student_95
from pose.tasks.haystack import words_digest
from pose.tasks.needle_gain import SwapPrompts

log = logging.getLogger(__name__)


class NeedleGain(TaskByLength):
    """Nats per answer token that the needle's value saves; a length is a unit.

    A prompt has two texts, which differ in the value of the needle that is asked for, and either value is the answer
    once: the gain is the mean NLL of an answer's tokens after the text with the other value, minus that after the text
    with its own. It is 0 where what stands at the needle does not reach the answer, whatever the perplexity.

    Metrics:
        needle_gain@N: for each N, tokens of prompt and answer together, the mean over prompts.
        needle_gain@N/D: for each depth D.
        needle_gain_kept@N: `kept`, of the gain at the model's own window. That length is measured too, or the longest
            where all are inside of the window.

    Args:
        tokenizer: the models'.
        haystack: the text.
        lengths: the N.
        window: the model's own, before any scaling, in tokens.
        depths: places in the haystack, as in `SwapPrompts.sample`; taken in turn.
        trials: prompts per length, at least one for each depth.
        seed: of keys, values and where the text begins.
        bos_id: put before each prompt, and counted in its length, when given.

    Raises:
        ConfigError: an empty haystack, fewer trials than depths, a length or window that is too short (names the
            shortest), or a tokenizer that cannot tell numbers apart.
    """

    name = "needle_gain"

    def __init__(
        self,
        tokenizer,
        haystack: str,
        lengths: Sequence[int],
        *,
        window: int,
        depths: Sequence[float],
        trials: int,
        seed: int,
        bos_id: int | None = None,
    ):
        self.window = min(window, max(lengths))
        super().__init__([*lengths, self.window])
        self.depths, self.trials = sorted({float(depth) + 0.0 for depth in depths}), trials  # -0.0 is 0
        if trials < len(self.depths):
            raise ConfigError(
                f"{{group}}.trials={trials} is too few for needle_gain at {len(self.depths)} depths: give at least "
                f"{len(self.depths)}, or fewer {{group}}.depths",
                group="eval",
            )
        self.prompts = SwapPrompts(tokenizer, haystack, seed=seed, bos_id=bos_id)
        self.haystack_digest = hashlib.sha256(haystack.encode()).hexdigest()
        rounds = math.ceil(trials / len(self.depths))
        shortest = self.prompts.shortest(self.lengths[0], self.depths, rounds)
        if shortest > self.window and self.window not in lengths:
            raise ConfigError(
                f"{{group}}.tasks has needle_gain, which needs a prompt inside the model's own window of {window} "
                f"tokens, and with this tokenizer the shortest has {shortest}: leave it out",
                group="eval",
            )
        self.prompts.check(self.lengths[0], self.depths, rounds)

    def metrics(self) -> dict[str, Metric]:
        names = [
            name
            for n in self.lengths
            for name in (
                f"needle_gain@{n}", f"needle_gain_kept@{n}", *(f"needle_gain@{n}/{exactly(d)}" for d in self.depths)
            )
        ]  # fmt: skip
        return {name: describe(name) for name in names}

    def depends(self) -> dict[str, Any]:
        return {
            "depths": self.depths, "trials": self.trials, "seed": self.prompts.seed, "bos": self.prompts.bos,
            "tokenizer": tokenizer_digest(self.prompts.tokenizer), "haystack": self.haystack_digest,
            "words": words_digest(),
        }  # fmt: skip

    def measure(self, scorer: Scorer, unit: str) -> dict[str, list[list[float]]]:
        """By depth (`exactly`): for each prompt the NLL of an answer's tokens after the swapped text, and the true one.

        Both are means over the tokens of two answers, in nats.
        """
        outcome: dict[str, list[list[float]]] = {exactly(depth): [] for depth in self.depths}
        for begin in range(0, self.trials, len(self.depths)):  # what these prompts begin with is read once
            depths = self.depths[: self.trials - begin]
            prompts = [self.prompts.sample(int(unit), depth, begin // len(self.depths)) for depth in depths]
            windows = np.concatenate([prompt.input_ids.reshape(4, -1) for prompt in prompts])
            losses = scorer.ending_nll(windows, max(prompt.num_answer for prompt in prompts))
            by_prompt = losses.reshape(len(prompts), 2, 2, -1)  # by text and answer
            for depth, prompt, nll in zip(depths, prompts, by_prompt, strict=True):
                (own, other), (another, own_too) = nll[..., -prompt.num_answer :].mean(-1)
                outcome[exactly(depth)].append([float(other + another) / 2, float(own + own_too) / 2])
        return outcome

    def accepts(self, unit: str, outcome: Any) -> bool:
        num = [len(range(i, self.trials, len(self.depths))) for i in range(len(self.depths))]
        return (
            list(outcome) == [*map(exactly, self.depths)]
            and [*map(len, outcome.values())] == num
            and all(are_numbers(pair, 2) for row in outcome.values() for pair in row)
        )

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        gains = {
            n: {depth: [swapped - true for swapped, true in row] for depth, row in by_depth.items()}
            for n, by_depth in outcomes.items()
        }
        prompts = {n: [gain for row in by_depth.values() for gain in row] for n, by_depth in gains.items()}
        inside = prompts[str(self.window)]
        estimates: dict[str, Estimate] = {}
        for n, by_depth in gains.items():
            estimates[f"needle_gain@{n}"] = mean(prompts[n])
            estimates[f"needle_gain_kept@{n}"] = kept(prompts[n], inside)
            estimates |= {f"needle_gain@{n}/{depth}": mean(row) for depth, row in by_depth.items()}
        found = estimates[f"needle_gain@{self.window}"]
        if math.isnan(estimates[f"needle_gain_kept@{self.window}"].value):
            log.info(
                f"needle_gain_kept is not given: inside the model's own window, at {self.window:,} tokens, the gain of "
                f"{found.value:.3g} nats per token is not surely above 0, so that there is nothing to keep"
            )
        return estimates


def mean(gains: Sequence[float]) -> Estimate:
    """Of prompts, with its interval."""
    return ratio(gains, [1.0] * len(gains))


def kept(gains: Sequence[float], inside: Sequence[float]) -> Estimate:
    """The mean gain as a share of that inside the window, with Fieller's interval (Fieller 1954) for paired means.

    Args:
        gains: of each prompt.
        inside: of the same prompts inside the window.

    Returns:
        The ratio of the means. Not a number where the gain inside, of several prompts, is not above 0 by more than its
        interval: the shares that go with the two means then have no bounds.
    """
    num = len(gains)
    if num < 2:
        return Estimate(math.nan, num=num)
    top, bottom = float(np.mean(gains)), float(np.mean(inside))
    (top_var, both), (_, bottom_var) = student_95(num - 1) ** 2 * np.cov(gains, inside) / num
    # The shares r for which the mean of gains - r inside is within its interval of 0: a r^2 - 2 b r + c <= 0
    a, b, c = bottom**2 - bottom_var, top * bottom - both, top**2 - top_var
    if not (bottom > 0 and a > 0):
        return Estimate(math.nan, num=num)
    half = math.sqrt(max(b**2 - a * c, 0.0))
    return Estimate(top / bottom, float((b - half) / a), float((b + half) / a), num)
