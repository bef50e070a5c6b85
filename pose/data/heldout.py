"""Whole documents that are kept for evaluation: a share of the training data, or those that are named."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pose.data.cache import TokenCache
from pose.errors import DataError

EDGE = 512  # tokens at either end of a document that its digest is of


@dataclass(frozen=True)
class SetAside:
    """A share of the documents that are long enough to be measured on.

    The choice depends on the documents' ids alone: it is the same for every seed, sampler and method of a sweep.

    Args:
        documents: of the training, as `TokenCache.build` takes them.
        share: of the documents with long_enough tokens, in (0, 1); at least one is taken, and one is left.
        long_enough: tokens.
        asked_by: the key of the config that asks for so many, for the error.
        cache_dir: the folder of all token caches.
        text_field: as `TokenCache.build`.
        choice: its other options.
    """

    documents: Any
    share: float
    long_enough: int
    cache_dir: str | Path
    text_field: str = "text"
    asked_by: str = "eval.lengths"
    choice: Mapping[str, Any] = field(default_factory=dict)

    def open(self, tokenizer) -> tuple[TokenCache, list[int]]:
        """The documents' cache, and which of them are set aside.

        Raises:
            DataError: fewer than two documents are long enough.
        """
        cache = TokenCache.build(self.documents, tokenizer, self.cache_dir, self.text_field, **self.choice)
        chosen = self.of(cache)
        if not chosen:
            num = int((cache.lengths >= self.long_enough).sum())
            raise DataError(
                f"{num} of the {len(cache):,} documents of {cache.info['documents']} have {self.long_enough:,} tokens "
                f"({self.asked_by}), and at least two are needed to set one aside for perplexity: give others with "
                f"data.heldout, less with {self.asked_by}, or measure without perplexity ({{group}}.tasks=[passkey])",
                group="eval",
            )
        return cache, chosen

    def of(self, cache: TokenCache) -> list[int]:
        """Which documents of the cache are set aside, sorted; none where fewer than two are long enough."""
        candidates = np.flatnonzero(cache.lengths >= self.long_enough).tolist()
        if len(candidates) < 2:
            return []
        num = min(max(round(self.share * len(candidates)), 1), len(candidates) - 1)
        by_id = sorted(candidates, key=lambda i: (hashlib.sha256(cache.ids[i].encode()).digest(), i))
        return sorted(by_id[:num])


def without(num: int, left_out: Sequence[int]) -> np.ndarray:
    """The indices of num documents, but for those left out; int64."""
    return np.setdiff1d(np.arange(num), np.asarray(left_out, np.int64))


def found_again(cache: TokenCache, others: Sequence[np.ndarray]) -> list[int]:
    """Which documents of a cache have the same tokens as one of others, sorted; of one tokenizer."""
    same_length = np.flatnonzero(np.isin(cache.lengths, [len(one) for one in others])).tolist()
    texts = {one.tobytes() for one in others} if same_length else set()
    return [i for i in same_length if cache[i].tobytes() in texts]


def document_digests(documents: Iterable[np.ndarray]) -> np.ndarray:
    """A number for each document, from its length and the tokens at its two ends; uint64 [D].

    It is the same wherever the document stands, for one tokenizer, and needs no pass over the whole text.
    """
    numbers = []
    for tokens in documents:
        ends = np.concatenate([tokens[:EDGE], tokens[-EDGE:], [len(tokens)]]).astype("<i8")
        numbers.append(int.from_bytes(hashlib.sha256(ends.tobytes()).digest()[:8], "little"))
    return np.array(numbers, np.uint64)
