"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300) with the PoSE paper's prompt, and as an example."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pose.errors import ConfigError
from pose.tasks.tokens import ids_after, stretch, token_ids

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
KEY_DIGITS = 5
IS_TEXT_FILLER = 0.5  # of the training examples, the share whose filler is real text


class PasskeyPrompt(NamedTuple):
    """One prompt together with its answer.

    Attributes:
        input_ids: int64 [length]; the last num_answer are the key.
        num_answer: tokens of the answer.
        key: the digits.
        key_start: index of the key line's first token.
    """

    input_ids: np.ndarray
    num_answer: int
    key: str
    key_start: int


class PasskeyPrompts:
    """Makes prompts of an exact length in tokens, for any tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        bos_id: put before the prompt, and counted in its length, when given.
    """

    def __init__(self, tokenizer, bos_id: int | None = None):
        self.tokenizer = tokenizer
        self.bos = np.array([] if bos_id is None else [bos_id], np.int64)
        self.introduction = token_ids(tokenizer, INTRODUCTION)
        self.filling = self._after("\n", FILLER)
        self.period = len(self.filling)  # approximate tokens of FILLER: repeated, it may have others
        self.question = self._after(".", QUESTION)

    def sample(
        self,
        rng: np.random.Generator,
        length: int,
        depth: float | None = None,
        filler: np.ndarray | None = None,
        introduce: bool = True,
    ) -> PasskeyPrompt:
        """Draws a key and its place.

        Args:
            rng: the only source of randomness.
            length: tokens of prompt and answer together: exactly so many are returned.
            depth: the key line's place in the filler, 0 (start) to 1 (end); None draws it.
            filler: int64, at least `length` tokens to hide the key in; None takes the paper's.
            introduce: whether the prompt begins with the task's introduction.

        Raises:
            ConfigError: the prompt does not fit into `length`.
        """
        key = "".join(str(d) for d in rng.integers(0, 10, KEY_DIGITS))
        question, answer = self._question_and_answer(key)
        line = self._after(".", KEY_LINE.format(key=key))
        head = np.concatenate([self.bos, self.introduction]) if introduce else self.bos
        room = length - len(head) - len(line) - len(question) - len(answer)
        if room < 0:
            raise ConfigError(
                f"a passkey prompt of {length} tokens is not possible: with this tokenizer the shortest "
                f"has {length - room}; give longer {{group}}.lengths, or where it trains data.synthetic.passkey=0",
                group="eval",
            )
        before = round(depth * room) if depth is not None else int(rng.integers(room, endpoint=True))
        filling = self.filler(room) if filler is None else filler[:room]
        parts = [head, filling[:before], line, filling[before:], question, answer]
        return PasskeyPrompt(np.concatenate(parts), len(answer), key, len(head) + before)

    def filler(self, num: int) -> np.ndarray:
        """The first num tokens of FILLER, repeated, tokenised as running text; int64 [num]."""
        times = num // self.period + 1
        while len(self.filling) < num + self.period:  # the end of a text may be tokenised differently
            times *= 2
            self.filling = self._after("\n", " ".join([FILLER] * times))
        return self.filling[:num]

    def shortest(self, introduce: bool = True) -> int:
        """Tokens of a prompt without filler (for the key 00000: others may differ by a token or two)."""
        question, answer = self._question_and_answer("0" * KEY_DIGITS)
        line = self._after(".", KEY_LINE.format(key="0" * KEY_DIGITS))
        head = len(self.bos) + (len(self.introduction) if introduce else 0)
        return head + len(line) + len(question) + len(answer)

    def _question_and_answer(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Both as the tokenizer splits them when they stand together, which may not be how it splits them alone."""
        both = self._after(".", f"{QUESTION} {key}")
        shared = min(len(self.question), len(both) - 1)
        while not np.array_equal(both[:shared], self.question[:shared]):
            shared -= 1
        return both[:shared], both[shared:]

    def _after(self, before: str, text: str) -> np.ndarray:
        return ids_after(self.tokenizer, before, text)


class Passkey:
    """The evaluation's passkey prompt with its answer; the filler is the paper's, or real text.

    The prompt takes a random part of the example and text follows it. Were it always as long as the
    example, a model could learn which digit belongs to which position in place of copying the key.
    """

    SLACK = 8  # tokens by which keys may differ

    def __init__(self, tokenizer, documents: Sequence[np.ndarray], vocab_size: int | None = None):
        self.prompts, self.documents = PasskeyPrompts(tokenizer), documents
        self.full_stop = ids_after(tokenizer, "7", ".")
        self.question_len = len(self.prompts.question)

    def sample(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them are answers; see `pose.tasks.synthetic`."""
        introduce = length >= self.prompts.shortest() + len(self.full_stop) + self.SLACK
        shortest = min(self.prompts.shortest(introduce) + len(self.full_stop) + self.SLACK, length)
        used = int(rng.integers(shortest, length, endpoint=True))
        if rng.random() < IS_TEXT_FILLER:
            filler = stretch(rng, self.documents, used)
        else:  # from any word on: else a prompt of one length would always end in the same words
            first = int(rng.integers(self.prompts.period))
            filler = self.prompts.filler(first + used)[first:]
        prompt = self.prompts.sample(rng, used - len(self.full_stop), filler=filler, introduce=introduce)
        tokens = np.concatenate([prompt.input_ids, self.full_stop, stretch(rng, self.documents, length - used)])
        is_answer = np.zeros(length, bool)
        is_answer[used - len(self.full_stop) - prompt.num_answer : used] = True
        return tokens, is_answer
