"""Key-value pairs as a training example: a list of them, then the keys again, to be answered."""

from collections.abc import Sequence

import numpy as np

from pose.errors import ConfigError
from pose.tasks.tokens import fit, ids_after, plain_tokens, token_ids


class KeyValue:
    """A list of key-value pairs, then the same keys in other orders, to be answered until the example is full.

    Keys are two random tokens; the values of an example are numbers of three to seven digits, all of one length. The
    list is of any length up to half of the example: with few pairs a model learns to look one up at all (docs/LOG.md).
    """

    DIGITS = (3, 7)  # of a value, at least and at most

    def __init__(self, tokenizer, documents: Sequence[np.ndarray], vocab_size: int | None = None):
        self.words = plain_tokens(tokenizer, vocab_size)
        self.digits = np.array([token_ids(tokenizer, str(d))[-1] for d in range(10)])
        self.middle, self.end = ids_after(tokenizer, "a", " is"), ids_after(tokenizer, "7", "\n")
        self.question_len = 2 + len(self.middle)
        # A pair, and a question up to the first digit that it asks for
        self.least = 2 * self.question_len + self.DIGITS[1] + len(self.end) + 1

    def sample(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them are answers; see `pose.tasks.synthetic`.

        Raises:
            ConfigError: length is below the shortest example.
        """
        if length < self.least:
            raise ConfigError(f"data.synthetic.key_value needs {self.least} tokens in an example, and has {length}")
        value_len = int(rng.integers(*self.DIGITS, endpoint=True))
        pair_len = self.question_len + value_len + len(self.end)
        room = max(2, length // pair_len)  # for pairs and questions
        num_pairs = int(rng.integers(1, room // 2, endpoint=True))
        keys = rng.choice(self.words, (num_pairs, 2))
        values = rng.choice(self.digits, (num_pairs, value_len))
        middle, end = (np.tile(ids, (num_pairs, 1)) for ids in (self.middle, self.end))
        pairs = np.concatenate([keys, middle, values, end], 1)
        answers = np.zeros((num_pairs, pair_len), bool)
        answers[:, self.question_len : self.question_len + value_len] = True
        asked = np.concatenate([rng.permutation(num_pairs) for _ in range(-(-room // num_pairs))])
        tokens = np.concatenate([pairs, pairs[asked]]).ravel()
        is_answer = np.concatenate([np.zeros_like(answers), answers[asked]]).ravel()
        return fit(tokens, length, 0), fit(is_answer, length, False)
