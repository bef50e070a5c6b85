"""A needle in real text, over length and depth (Kamradt 2023), with a fact that cannot be guessed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pose.errors import ConfigError
from pose.tasks.haystack import ExactTexts, no_tokens, split_sentences
from pose.tasks.ruler import NEEDLE, NIAH_ONE, needle_word


class NeedlePrompt(NamedTuple):
    """One prompt together with its answer.

    Attributes:
        input_ids: int64 [length]; the last num_answer are the number.
        num_answer: tokens of the answer.
        key: the number's seven digits.
        needle_start: index of the needle's first token.
        depth: the share of the haystack's tokens before the needle.
    """

    input_ids: np.ndarray
    num_answer: int
    key: str
    needle_start: int
    depth: float


class NeedleTexts(ABC):
    """What prompts with needles are made of: sentences of a text as tokens, and needles that stand between them.

    Args:
        tokenizer: a transformers tokenizer.
        haystack: the text.
        seed: of keys, numbers and where the text begins.
        bos_id: put before each prompt, and counted in its length, when given.

    Raises:
        ConfigError: a haystack without text, or without any that the tokenizer knows.
    """

    def __init__(self, tokenizer, haystack: str, *, seed: int, bos_id: int | None = None):
        self.tokenizer, self.seed = tokenizer, seed
        self.bos = [] if bos_id is None else [bos_id]
        self.texts = ExactTexts(tokenizer)
        self.sentences = self._after_full_stop(split_sentences(haystack))
        if not any(map(len, self.sentences)):
            raise no_tokens()

    def check(self, length: int, depths: Sequence[float], trials: int):
        """Makes sure that all prompts of a length are possible, without making them.

        Raises:
            ConfigError: one is not; names the shortest length that is.
        """
        shortest = self.shortest(length, depths, trials)
        if shortest > length:
            raise ConfigError(
                f"a needle prompt of {length} tokens is not possible: with this tokenizer the shortest has "
                f"{shortest}; give more, in {{group}}.lengths",
                group="eval",
            )

    def shortest(self, length: int, depths: Sequence[float], trials: int) -> int:
        """The least length, from `length` on, of which all prompts are possible."""
        while (needed := self._needed(length, depths, trials)) > length:  # keys may differ with the length
            length = needed
        return length

    @abstractmethod
    def _needed(self, length: int, depths: Sequence[float], trials: int) -> int:
        """The tokens of the longest prompt of a length without haystack."""

    def _filling(self, first: int, room: int) -> tuple[np.ndarray, np.ndarray]:
        """`room` tokens of the haystack from a sentence on; and where its sentences begin, the first at 0."""
        chosen, total = [], 0
        while total < room:
            chosen.append(self.sentences[first % len(self.sentences)])
            total, first = total + len(chosen[-1]), first + 1
        borders = np.cumsum([0, *map(len, chosen)])
        tokens = np.concatenate([np.array([], np.int64), *chosen])[:room]
        return tokens, borders[borders <= room]

    def _after_full_stop(self, sentences: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each sentence as they are when it stands after another one and a space."""
        stop = self.texts.ids(".")
        texts = [f". {sentence}" for sentence in sentences]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            np.array(row[len(stop) :] if row[: len(stop)] == stop else self.texts.ids(f" {sentence}"), np.int64)
            for row, sentence in zip(rows, sentences, strict=True)
        ]


class NeedlePrompts(NeedleTexts):
    """The prompts of RULER's niah_single_2, of an exact length in tokens, for any tokenizer.

    `One of the special magic numbers for small-river is: 1234567.` stands between two sentences of a text. Each trial
    begins at another sentence of it, and the text is begun again where it ends. The prompts of a trial differ in depth,
    key and number alone: depths are compared on one text, and what stands before the needles can be read once.
    """

    def sample(self, length: int, depth: float, trial: int) -> NeedlePrompt:
        """The prompt of a trial, a pure function of (seed, length, depth, trial); exactly `length` tokens.

        Args:
            length: of prompt and number together.
            depth: place in the haystack by tokens, 0 (start) to 1 (end). The needle stands at the nearest border of two
                sentences.
            trial: tells prompts apart.
        """
        rng = self._rng(length, depth, trial)
        head, needle, question, answer, number = self._parts(rng)
        room = length - sum(map(len, (head, needle, question, answer)))
        first = np.random.default_rng((self.seed, trial, length)).integers(len(self.sentences))
        filling, borders = self._filling(int(first), room)
        before = int(borders[np.abs(borders - depth * room).argmin()])
        parts = [head, filling[:before], needle, filling[before:], question, answer]
        return NeedlePrompt(
            np.concatenate(parts), len(answer), number, len(head) + before, before / room if room else 0.0
        )

    def _rng(self, length: int, depth: float, trial: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, trial, length, *np.float64(depth).tobytes()))

    def _needed(self, length: int, depths: Sequence[float], trials: int) -> int:
        drawn = [self._rng(length, depth, trial) for depth in depths for trial in range(trials)]
        return max(sum(map(len, self._parts(rng)[:4])) for rng in drawn)

    def _parts(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
        """The tokens of head, needle, question and answer; and the answer."""
        key, number = needle_word(rng), str(rng.integers(1_000_000, 10_000_000))
        introduction, question, prefix = (part.format(kind="number", query=key) for part in NIAH_ONE)
        [needle] = self._after_full_stop([NEEDLE.format(kind="number", key=key, value=number)])
        asked, both = (np.array(self.texts.ids(question + prefix + end), np.int64) for end in ("", f" {number}"))
        shared = min(len(asked), len(both) - 1)
        while not np.array_equal(both[:shared], asked[:shared]):
            shared -= 1
        head = np.array([*self.bos, *self.texts.ids(introduction)], np.int64)
        return head, needle, both[:shared], both[shared:], number
