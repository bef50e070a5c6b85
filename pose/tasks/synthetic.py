"""Retrieval examples, made rather than read: what a model must have seen to look things up.

Each task is a small class with ``sample(rng, length)``, which returns ``(tokens, is_answer)``,
int64 and bool [length]. The loss is taken on the answers alone.
"""

from collections.abc import Sequence

import numpy as np

from pose.errors import ConfigError
from pose.tasks.passkey import PasskeyPrompts

IS_TEXT_FILLER = 0.5  # of the passkey prompts, the share whose filler is real text


class KeyValue:
    """A list of key-value pairs, then the same keys in another order, to be answered.

    Keys are two random tokens; a value is five digits or one to three random tokens.
    """

    def __init__(self, tokenizer, documents: Sequence[np.ndarray]):
        self.words = _plain_tokens(tokenizer)
        self.digits = np.array([_ids(tokenizer, str(d))[-1] for d in range(10)])
        self.middle, self.end = _ids(tokenizer, " is"), _ids(tokenizer, "\n")

    def sample(self, rng: np.random.Generator, length: int):
        value_len, symbols = (5, self.digits) if rng.random() < 0.5 else (rng.integers(1, 4), self.words)
        pair_len = 2 + len(self.middle) + value_len + len(self.end)
        num_pairs = max(1, length // (2 * pair_len))
        keys = rng.choice(self.words, (num_pairs, 2))
        values = rng.choice(symbols, (num_pairs, value_len))
        middle, end = (np.tile(ids, (num_pairs, 1)) for ids in (self.middle, self.end))
        pairs = np.concatenate([keys, middle, values, end], 1)
        answers = np.zeros((num_pairs, pair_len), bool)
        answers[:, 2 + len(self.middle) : 2 + len(self.middle) + value_len] = True
        tokens = np.concatenate([pairs, pairs[rng.permutation(num_pairs)]]).ravel()
        is_answer = np.concatenate([np.zeros_like(answers), answers]).ravel()
        return _fit(tokens, length, 0), _fit(is_answer, length, False)


class Copy:
    """A span, something else, and the span again: of text, or of random tokens."""

    CUE = 3  # tokens of the repetition that say which span it is
    MIN_LENGTH = 4 * CUE

    def __init__(self, tokenizer, documents: Sequence[np.ndarray]):
        self.words, self.documents = _plain_tokens(tokenizer), documents

    def sample(self, rng: np.random.Generator, length: int):
        if length < self.MIN_LENGTH:
            raise ConfigError(f"data.synthetic.copy needs {self.MIN_LENGTH} tokens in an example, and has {length}")
        if rng.random() < 0.5:
            tokens = _stretch(rng, self.documents, length)
        else:
            tokens = rng.choice(self.words, length)
        span_len = int(rng.integers(2 * self.CUE, length // 2, endpoint=True))
        second = length - span_len - int(rng.integers(0, length - 2 * span_len, endpoint=True))
        first = int(rng.integers(0, second - span_len, endpoint=True))
        tokens[second : second + span_len] = tokens[first : first + span_len]
        is_answer = np.zeros(length, bool)
        is_answer[second + self.CUE : second + span_len] = True
        return tokens, is_answer


class Passkey:
    """The evaluation's passkey prompt with its answer; the filler is the paper's, or real text.

    The prompt takes a random part of the example and text follows it. Were it always as long as the
    example, a model could learn which digit belongs to which position in place of copying the key.
    """

    SLACK = 8  # tokens by which keys may differ

    def __init__(self, tokenizer, documents: Sequence[np.ndarray]):
        self.prompts, self.documents = PasskeyPrompts(tokenizer), documents
        self.full_stop = _ids(tokenizer, ".")

    def sample(self, rng: np.random.Generator, length: int):
        introduce = length >= self.prompts.shortest() + len(self.full_stop) + self.SLACK
        shortest = min(self.prompts.shortest(introduce) + len(self.full_stop) + self.SLACK, length)
        used = int(rng.integers(shortest, length, endpoint=True))
        if rng.random() < IS_TEXT_FILLER:
            filler = _stretch(rng, self.documents, used)
        else:  # from any word on: else a prompt of one length would always end in the same words
            first = int(rng.integers(self.prompts.period))
            filler = self.prompts.filler(first + used)[first:]
        prompt = self.prompts.sample(rng, used - len(self.full_stop), filler=filler, introduce=introduce)
        tokens = np.concatenate([prompt.input_ids, self.full_stop, _stretch(rng, self.documents, length - used)])
        is_answer = np.zeros(length, bool)
        is_answer[used - len(self.full_stop) - prompt.num_answer : used] = True
        return tokens, is_answer


TASKS = {"key_value": KeyValue, "copy": Copy, "passkey": Passkey}


def _ids(tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain_tokens(tokenizer) -> np.ndarray:
    special = set(tokenizer.all_special_ids)
    return np.array([i for i in range(len(tokenizer)) if i not in special])


def _stretch(rng, documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """length tokens in a row, int64, from a random document, which is repeated if it is shorter."""
    document = documents[int(rng.integers(len(documents)))]
    start = int(rng.integers(max(1, len(document) - length + 1)))
    return np.resize(document[start : start + length], length).astype(np.int64)


def _fit(values: np.ndarray, length: int, fill) -> np.ndarray:
    """Cut or filled up to length."""
    return np.concatenate([values[:length], np.full(max(0, length - len(values)), fill, values.dtype)])
