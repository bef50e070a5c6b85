"""What the training examples of the retrieval tasks are made of: tokens of a text, of a document, or at random."""

from collections.abc import Sequence

import numpy as np


def token_ids(tokenizer, text: str) -> np.ndarray:
    """The tokens of a text without special ones, int64 [Lx]."""
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def ids_after(tokenizer, before: str, text: str) -> np.ndarray:
    """The tokens of a text as they are after another one, int64 [Lx]; by itself where the two share a token.

    A tokenizer of LLaMA's kind puts a space before every text that it is given.
    """
    first, both = token_ids(tokenizer, before), token_ids(tokenizer, before + text)
    return both[len(first) :] if np.array_equal(both[: len(first)], first) else token_ids(tokenizer, text)


def plain_tokens(tokenizer, vocab_size: int | None = None) -> np.ndarray:
    """Every token that is not special and has a row in an embedding of vocab_size rows, int64.

    Special are those with a role (BOS, ...) and those that are reserved for one (Llama 3 has 256 of both).
    """
    reserved = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    ids = set(tokenizer.get_vocab().values()).difference(tokenizer.all_special_ids, reserved)
    return np.array(sorted(i for i in ids if vocab_size is None or i < vocab_size))


def stretch(rng: np.random.Generator, documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """length tokens in a row, int64, from a random document, which is repeated if it is shorter."""
    document = documents[int(rng.integers(len(documents)))]
    start = int(rng.integers(max(1, len(document) - length + 1)))
    return np.resize(document[start : start + length], length).astype(np.int64)


def fit(values: np.ndarray, length: int, fill) -> np.ndarray:
    """Cut or filled up to length."""
    return np.concatenate([values[:length], np.full(max(0, length - len(values)), fill, values.dtype)])
