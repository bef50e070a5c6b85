"""Needles among others of the same form: texts that differ in the value of one alone, and texts asked for each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pose.errors import ConfigError
from pose.tasks.needle import NeedleTexts
from pose.tasks.ruler import NEEDLE, NEEDLES, NIAH_ONE, distinct, needle_word

NUM_KEYS = NEEDLES["niah_multikey_1"].num_keys  # needles in a text
DISTRACTORS = NUM_KEYS - 1  # needles beside the one that is asked for
DIGITS = 7  # of a value
MOST_TRIES = 1000  # pairs of values that are drawn before a tokenizer counts as one that cannot tell numbers apart


class SwapPrompt(NamedTuple):
    """A question about one of two texts, and its answer by either.

    Attributes:
        input_ids: int64 [2, 2, length], by text and answer: text t has the value t in its needle, and is followed by
            value a as the answer. Nothing else differs.
        num_answer: tokens of a value as the answer: the last of each row.
        values: the digits of both.
        needle_start: index of the needle's first token.
    """

    input_ids: np.ndarray
    num_answer: int
    values: tuple[str, str]
    needle_start: int


class MultiKeyPrompt(NamedTuple):
    """A text with several needles, and a question about each.

    Attributes:
        input_ids: int64 [NUM_KEYS, length]: the text, a question and its answer. A shorter row than the longest has its
            last token repeated at the end.
        position_ids: int64 [length] of every row.
        answers: where the answer of each row stands.
        keys, values: of the needles, in the order of the rows.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    answers: list[slice]
    keys: list[str]
    values: list[str]


class SwapPrompts(NeedleTexts):
    """The prompts of RULER's niah_multikey_1, of an exact length in tokens, each with two values of its needle.

    Four needles `One of the special magic numbers for small-river is: 1234567.` stand between sentences of a text; one
    is asked for. The two values differ in every digit, and each is as likely as the other to be either; whatever the
    tokenizer, they have as many tokens, at the same places, and no token is the same.

    Question, values, and the order of text and distractors do not depend on the length: lengths are compared in pairs.
    The prompts of a trial have text and distractors in common: what stands before the needles can be read once.
    """

    def sample(self, length: int, depth: float, trial: int) -> SwapPrompt:
        """The prompt of a trial, a pure function of (seed, length, depth, trial); exactly `length` tokens.

        Args:
            length: of prompt and answer together.
            depth: place of the needle, by tokens of text and distractors, 0 (start) to 1 (end): it stands before the
                sentence that begins nearest to it. Distractors are drawn uniformly.
            trial: tells prompts apart.
        """
        first, distractors, places = self._text(trial)
        head, needles, question, answers, values = self._question(depth, trial, distractors)
        hidden = self._needles(distractors.items())
        around = length - sum(map(len, (head, *hidden)))  # the same for all questions of a trial
        room = around - sum(map(len, (needles[0], question, answers[0])))
        filling, borders = self._filling(first, room)
        sentences = np.split(filling, borders[1:])
        _hide(hidden, sentences, places * around)
        (before,) = _nearest(sentences, [depth * sum(map(len, sentences))])
        texts = [
            np.concatenate([head, *sentences[:before], needle, *sentences[before:], question]) for needle in needles
        ]
        return SwapPrompt(
            np.stack([[np.concatenate([text, answer]) for answer in answers] for text in texts]),
            len(answers[0]),
            values,
            len(head) + sum(map(len, sentences[:before])),
        )

    def _needed(self, length: int, depths: Sequence[float], trials: int) -> int:
        needed = 0
        for trial in range(trials):
            _, distractors, _ = self._text(trial)
            hidden = sum(map(len, self._needles(distractors.items())))
            for depth in depths:
                head, needles, question, answers, _ = self._question(depth, trial, distractors)
                needed = max(needed, hidden + sum(map(len, (head, needles[0], question, answers[0]))))
        return needed

    def _text(self, trial: int) -> tuple[int, dict[str, str], np.ndarray]:
        """The sentence that a trial's text begins with; keys and values of its distractors, their places in [0, 1)."""
        rng = np.random.default_rng((self.seed, trial))
        first = int(rng.integers(len(self.sentences)))
        keys = distinct(lambda: needle_word(rng), DISTRACTORS)
        values = distinct(lambda: str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS)), DISTRACTORS)
        return first, dict(zip(keys, values, strict=True)), rng.random(DISTRACTORS)

    def _needles(self, pairs: Iterable[tuple[str, str]]) -> list[np.ndarray]:
        """The tokens of needles, by key and value."""
        return self._after_full_stop([NEEDLE.format(kind="number", key=key, value=value) for key, value in pairs])

    def _question(
        self, depth: float, trial: int, distractors: Mapping[str, str]
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, list[np.ndarray], tuple[str, str]]:
        """The tokens of head, needle with either value, question, and either answer; and the values."""
        rng = np.random.default_rng((self.seed, trial, *np.float64(depth).tobytes()))
        key = next(word for word in iter(lambda: needle_word(rng), None) if word not in distractors)
        introduction, question, prefix = (part.format(kind="number", query=key) for part in NIAH_ONE)
        head = np.array([*self.bos, *self.texts.ids(introduction)], np.int64)
        for _ in range(MOST_TRIES):
            values = _two_values(rng)
            needles = self._needles((key, value) for value in values)
            asked = [np.array(self.texts.ids(f"{question}{prefix} {value}"), np.int64) for value in values]
            begin, end = _only_difference(*asked)
            are_new = not set(values) & set(distractors.values())
            if are_new and begin < end == len(asked[0]) and any(_only_difference(*needles)):
                return head, needles, asked[0][:begin], [both[begin:] for both in asked], values
        raise ConfigError(
            "{group}.tasks has needle_gain, which needs numbers of as many tokens that have none in common, and this "
            "tokenizer has no such: leave it out",
            group="eval",
        )


class MultiKeyPrompts(NeedleTexts):
    """The prompts of RULER's niah_multikey_1, of an exact length in tokens, each of whose needles is asked for.

    The questions about a text cost little more than one, since the text before them goes through a model once.
    """

    def sample(self, length: int, depths: Sequence[float], trial: int, target_len: int | None = None) -> MultiKeyPrompt:
        """The prompts of a trial, a pure function of all arguments and the seed; exactly `length` tokens.

        Args:
            length: of text, question and answer together, by the longest question.
            depths: place of each needle by tokens of the text, 0 (start) to 1 (end): it stands before the sentence that
                begins nearest to it. NUM_KEYS of them.
            trial: tells prompts apart.
            target_len: T, the positions that the tokens are spread over; None: length, with the ids 0..length-1. The
                ids skip ahead before each needle, to `depths` of the T, and once between the last needle and the
                question, at the border of sentences nearest to the middle; the last token has T - 1.
        """
        first, keys, values, head, needles, asked = self._parts(trial)
        room = length - sum(map(len, (head, *needles))) - max(len(tokens) for tokens, _ in asked)
        filling, borders = self._filling(first, room)
        sentences = np.split(filling, borders[1:])
        by_depth = np.argsort(depths, kind="stable")  # positions rise: no needle stands before one of a lower depth
        _hide([needles[i] for i in by_depth], sentences, [depths[i] * room for i in by_depth])
        text = np.concatenate([head, *sentences])
        rows = [np.concatenate([text, tokens]) for tokens, _ in asked]
        return MultiKeyPrompt(
            np.stack([np.pad(row, (0, length - len(row)), mode="edge") for row in rows]),
            _spread(length, target_len or length, len(head), sentences, needles, depths),
            [slice(len(text) + begin, len(row)) for row, (_, begin) in zip(rows, asked, strict=True)],
            keys,
            values,
        )

    def _needed(self, length: int, depths: Sequence[float], trials: int) -> int:
        needed = 0
        for trial in range(trials):
            *_, head, needles, asked = self._parts(trial)
            needed = max(needed, sum(map(len, (head, *needles))) + max(len(tokens) for tokens, _ in asked))
        return needed

    def _parts(
        self, trial: int
    ) -> tuple[int, list[str], list[str], np.ndarray, list[np.ndarray], list[tuple[np.ndarray, int]]]:
        """The sentence that a text begins with, keys and values, the tokens of head and needles; of each question and
        answer the tokens, and where the answer begins: at the first token that another value would change.
        """
        rng = np.random.default_rng((self.seed, trial))
        first = int(rng.integers(len(self.sentences)))
        keys = distinct(lambda: needle_word(rng), NUM_KEYS)
        values = distinct(lambda: str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS)), NUM_KEYS)
        needles = self._after_full_stop(
            [NEEDLE.format(kind="number", key=key, value=value) for key, value in zip(keys, values, strict=True)]
        )
        asked = []
        for key, value in zip(keys, values, strict=True):
            introduction, question, prefix = (part.format(kind="number", query=key) for part in NIAH_ONE)
            other = "".join(str((int(digit) + 5) % 10) for digit in value)
            tokens, others = (np.array(self.texts.ids(f"{question}{prefix} {one}"), np.int64) for one in (value, other))
            size = min(len(tokens), len(others))
            begin = int((tokens[:size] == others[:size]).cumprod().sum())
            if begin == len(tokens):
                raise ConfigError("a search asks for numbers, and this tokenizer has no tokens that tell them apart")
            asked.append((tokens, begin))
        head = np.array([*self.bos, *self.texts.ids(introduction)], np.int64)
        return first, keys, values, head, needles, asked


def _two_values(rng: np.random.Generator) -> tuple[str, str]:
    """Two numbers that differ in every digit; exchanged, they are as likely."""
    digits = [1 + rng.choice(9, 2, replace=False), *(rng.choice(10, 2, replace=False) for _ in range(DIGITS - 1))]
    first, second = ("".join(map(str, row)) for row in np.transpose(digits))
    return first, second


def _only_difference(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Begin and end of the one stretch of tokens, all of them others, in which two texts differ; 0, 0 for any other."""
    places = np.flatnonzero(a != b) if len(a) == len(b) else np.array([], int)
    if not len(places) or places[-1] - places[0] + 1 != len(places):
        return 0, 0
    return int(places[0]), int(places[-1]) + 1


def _hide(needles: Sequence[np.ndarray], sentences: list[np.ndarray], places: Sequence[float] | np.ndarray):
    """Puts each needle before the sentence that begins nearest to its place, in tokens from the first.

    Those before one sentence stand in the order in which they are given.
    """
    befores = _nearest(sentences, places)
    for i in np.argsort(befores, kind="stable")[::-1]:  # from behind, so that the places of the others stay
        sentences.insert(befores[i], needles[i])


def _spread(
    length: int,
    target_len: int,
    begin: int,
    sentences: Sequence[np.ndarray],
    needles: Sequence[np.ndarray],
    depths: Sequence[float],
) -> np.ndarray:
    """Position ids for `MultiKeyPrompts.sample`, int64 [length]: those before a needle skip up to its depth.

    Args:
        length, target_len: tokens, and positions that they are spread over.
        begin: of the first sentence.
        sentences: the text, needles among them.
        needles, depths: each needle's place.
    """
    skipped = target_len - length
    begins = begin + np.cumsum([0, *map(len, sentences)])  # and the question's
    places = [next(i for i, one in enumerate(sentences) if one is needle) for needle in needles]
    after = begins[max(places) + 1 :]
    jumps = [(begins[place], round(depth * skipped)) for place, depth in zip(places, depths, strict=True)]
    jumps.append((after[np.abs(after - (after[0] + after[-1]) / 2).argmin()], skipped))
    offsets = np.zeros(length, np.int64)
    for place, offset in jumps:
        offsets[place:] = np.maximum(offsets[place:], offset)
    return np.arange(length) + offsets


def _nearest(sentences: Sequence[np.ndarray], places: Sequence[float] | np.ndarray) -> list[int]:
    """The sentences that begin nearest to places, in tokens from the first."""
    begins = np.cumsum([0, *map(len, sentences[:-1])])
    return [int(np.abs(begins - place).argmin()) for place in places]
