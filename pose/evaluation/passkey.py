"""Passkey retrieval accuracy, teacher-forced: no token is decoded, and what prompts begin with is read once."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from pose.data.tokenizer import tokenizer_digest
from pose.evaluation.generation import write
from pose.evaluation.scoring import Scorer
from pose.evaluation.task import Estimate, Metric, TaskByLength, are_shares, are_verdicts, describe, wilson
from pose.tasks.passkey import PasskeyPrompt, PasskeyPrompts

MORE_TOKENS = 3  # that are decoded beyond one for each digit: a space before the number, and where it ends


class NumberPrompt(Protocol):
    """A prompt that asks for a number, together with its answer.

    Attributes:
        input_ids: int64; the last num_answer are the answer.
        num_answer: tokens of the answer.
        key: its digits.
    """

    @property
    def input_ids(self) -> np.ndarray: ...

    @property
    def num_answer(self) -> int: ...

    @property
    def key(self) -> str: ...


def written(scorer: Scorer, tokenizer, prompts: Sequence[NumberPrompt]) -> list[bool]:
    """Whether greedy decoding, given each prompt without its answer, writes the key and no digit more.

    It is the digits that are compared, after any spaces: in which tokens they are written does not matter.
    """
    new_tokens = max((len(prompt.key) for prompt in prompts), default=0) + MORE_TOKENS
    rows = write(scorer, tokenizer, [prompt.input_ids[: -prompt.num_answer] for prompt in prompts], new_tokens)
    return [_leading_digits(tokenizer.decode(row)) == p.key for row, p in zip(rows, prompts, strict=True)]


def found(scorer: Scorer, tokenizer, prompts: Sequence[NumberPrompt]) -> list[bool]:
    """The verdicts of `written`, from forward passes over prompts with their answers.

    As far as the most likely tokens are those of the answer, they are what greedy decoding writes, and so is the first
    one that is not, or that follows. Nearly always that shows the verdict: it is another digit, or ends the number.
    Where it does not (the tokenizer has other tokens for the same digits, and the model prefers them), the prompt is
    decoded. Where frequencies depend on the length of the text (`depends_on_length`), those of prompt and answer
    together are taken here, and those of the text so far in `written`: there the two may differ.

    Args:
        scorer: of the model.
        tokenizer: the model's.
        prompts: all of one length.
    """
    num = max(prompt.num_answer for prompt in prompts) + 1
    predictions = scorer.predictions(np.stack([prompt.input_ids for prompt in prompts]), num)
    verdicts = [
        _verdict(tokenizer, predicted[-prompt.num_answer - 1 :], prompt)
        for prompt, predicted in zip(prompts, predictions, strict=True)
    ]
    decoded = iter(written(scorer, tokenizer, [p for p, v in zip(prompts, verdicts, strict=True) if v is None]))
    return [next(decoded) if verdict is None else verdict for verdict in verdicts]


def _verdict(tokenizer, predicted: np.ndarray, prompt: NumberPrompt) -> bool | None:
    """Whether the beginning of what is written shows the key, or that it is not written; None where it does not."""
    answer = prompt.input_ids[-prompt.num_answer :]
    right = np.cumprod(predicted[:-1] == answer).sum()
    tokens = predicted[: right + 1]
    text = tokenizer.decode(tokens).lstrip(" ")
    digits = _leading_digits(text)
    if len(digits) < len(text) or not prompt.key.startswith(digits):
        return digits == prompt.key
    return None


def _leading_digits(text: str) -> str:
    return "".join(takewhile("0123456789".__contains__, text.lstrip(" ")))


class Passkey(TaskByLength):
    """The share of prompts whose key is written by greedy decoding, and no digit more; a length is a unit.

    Metrics: passkey@N for each N, tokens of prompt and key together.

    Args:
        prompts: for the model's tokenizer.
        lengths: the N.
        trials: prompts per length.
        seed: of keys and places.
        depths: places of the key in [0, 1], taken in turn; None draws them.
        generate: whether prompts are decoded (`written`) instead of teacher-forced (`found`); the verdicts are equal.

    Raises:
        ConfigError: a length that is too short; names the shortest.
    """

    name = "passkey"

    def __init__(
        self,
        prompts: PasskeyPrompts,
        lengths: Sequence[int],
        *,
        trials: int,
        seed: int,
        depths: Sequence[float] | None = None,
        generate: bool = False,
    ):
        super().__init__(lengths)
        self.prompts = prompts
        self.trials, self.seed, self.generate = trials, seed, generate
        self.depths = None if depths is None else list(depths)
        for length in self.lengths:
            self.drawn(length)

    def drawn(self, length: int) -> list[PasskeyPrompt]:
        """The prompts of a length; prompt t is a pure function of (seed, length, t) and depths."""
        return [
            self.prompts.sample(
                np.random.default_rng((self.seed, length, t)),
                length,
                self.depths[t % len(self.depths)] if self.depths else None,
            )
            for t in range(self.trials)
        ]

    def metrics(self) -> dict[str, Metric]:
        return {name: describe(name) for name in (f"passkey@{n}" for n in self.lengths)}

    def depends(self) -> dict[str, Any]:
        return {
            "trials": self.trials, "seed": self.seed, "depths": self.depths, "generate": self.generate,
            "bos": self.prompts.bos.tolist(), "tokenizer": tokenizer_digest(self.prompts.tokenizer),
            "end": self.prompts.tokenizer.eos_token_id,
        }  # fmt: skip

    def measure(self, scorer: Scorer, unit: str) -> dict[str, list]:
        """By prompt: `found`, 0 or 1, and `depths`, the share of the prompt before the line with the key."""
        prompts = self.drawn(int(unit))
        verdicts = (written if self.generate else found)(scorer, self.prompts.tokenizer, prompts)
        places = [prompt.key_start / len(prompt.input_ids) for prompt in prompts]
        return {"found": [int(verdict) for verdict in verdicts], "depths": places}

    def accepts(self, unit: str, outcome: Any) -> bool:
        return are_verdicts(outcome["found"], self.trials) and are_shares(outcome["depths"], self.trials)

    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        return {f"passkey@{n}": wilson(sum(outcome["found"]), len(outcome["found"])) for n, outcome in outcomes.items()}
