"""Key-value pairs as a training example: a list of them, then the keys again, to be answered."""

from collections.abc import Sequence

import numpy as np

from pose.tasks.tokens import fit, plain_tokens, token_ids


class KeyValue:
    """A list of key-value pairs, then the same keys in another order, to be answered.

    Keys are two random tokens; a value is five digits or one to three random tokens.
    """

    def __init__(self, tokenizer, documents: Sequence[np.ndarray], vocab_size: int | None = None):
        self.words = plain_tokens(tokenizer, vocab_size)
        self.digits = np.array([token_ids(tokenizer, str(d))[-1] for d in range(10)])
        self.middle, self.end = token_ids(tokenizer, " is"), token_ids(tokenizer, "\n")

    def sample(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and which of them are answers; see `pose.tasks.synthetic`."""
        value_len, symbols = (5, self.digits) if rng.random() < 0.5 else (int(rng.integers(1, 4)), self.words)
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
        return fit(tokens, length, 0), fit(is_answer, length, False)
