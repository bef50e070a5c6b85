"""Copying as a training example: a span, something else, and the span again."""

from collections.abc import Sequence

import numpy as np

from pose.errors import ConfigError
from pose.tasks.tokens import plain_tokens, stretch


class Copy:
    """A span, something else, and the span again: of text, or of random tokens."""

    CUE = 3  # tokens of the repetition that say which span it is
    MIN_LENGTH = 4 * CUE
    question_len = CUE

    def __init__(self, tokenizer, documents: Sequence[np.ndarray], vocab_size: int | None = None):
        self.words, self.documents = plain_tokens(tokenizer, vocab_size), documents

    def sample(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them are answers; see `pose.tasks.synthetic`.

        Raises:
            ConfigError: length is below the shortest example.
        """
        if length < self.MIN_LENGTH:
            raise ConfigError(f"data.synthetic.copy needs {self.MIN_LENGTH} tokens in an example, and has {length}")
        if rng.random() < 0.5:
            tokens = stretch(rng, self.documents, length)
        else:
            tokens = rng.choice(self.words, length)
        span_len = int(rng.integers(2 * self.CUE, length // 2, endpoint=True))
        second = length - span_len - int(rng.integers(0, length - 2 * span_len, endpoint=True))
        first = int(rng.integers(0, second - span_len, endpoint=True))
        tokens[second : second + span_len] = tokens[first : first + span_len]
        is_answer = np.zeros(length, bool)
        is_answer[second + self.CUE : second + span_len] = True
        return tokens, is_answer
