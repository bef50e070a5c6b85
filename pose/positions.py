"""Which tokens of a document an example shows, and which position ids they get.

A sampler is a small frozen dataclass. ``sample(rng, document_len)`` is pure: the same generator
state gives the same example, and nothing is read or written.

Symbols follow the paper (PoSE, ICLR 2024, arXiv 2309.10400):
    L   train_len, tokens in a training example (the paper's Lc)
    T   target_len, the window to extend to (Lt); position ids are in [0, T)
    Lx  document_len, tokens in the document x that the example is drawn from
    N   num_chunks
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from pose.errors import ConfigError


class Layout(NamedTuple):
    """One example, as indices only.

    Attributes:
        position_ids: int64 [L], strictly increasing, in [0, T).
        content_ids: int64 [L], the index in the document of each token, in [0, Lx).
    """

    position_ids: np.ndarray
    content_ids: np.ndarray


@dataclass(frozen=True)
class PositionSampler(ABC):
    """What every sampler has in common.

    Args:
        train_len: tokens in a training example.
        target_len: the window to extend to, in tokens.

    Raises:
        ConfigError: a length is not a positive int, or target_len < train_len.
    """

    train_len: int
    target_len: int

    def __post_init__(self):
        for name in ("train_len", "target_len"):
            _require_int(f"pose.{name}", getattr(self, name), at_least=1)
        if self.target_len < self.train_len:
            raise ConfigError(
                f"pose.target_len={self.target_len} is below pose.train_len={self.train_len}: "
                "give a target of at least the training length"
            )

    @property
    def name(self) -> str:
        """What tables call it."""
        return type(self).__name__

    @property
    def example_len(self) -> int:
        """Tokens in one example."""
        return self.train_len

    @property
    def min_document_len(self) -> int:
        """The shortest document, in tokens, that this sampler can draw from."""
        return self.example_len

    def sample(self, rng: np.random.Generator, document_len: int) -> Layout:
        """Draws one example.

        Args:
            rng: the only source of randomness.
            document_len: Lx, tokens in the document.

        Returns:
            A Layout of int64 arrays [example_len].

        Raises:
            ValueError: document_len < min_document_len.
        """
        if document_len < self.min_document_len:
            raise ValueError(
                f"a document of {document_len} tokens is too short for {type(self).__name__}, "
                f"which needs {self.min_document_len}"
            )
        return self._sample(rng, document_len)

    @abstractmethod
    def _sample(self, rng: np.random.Generator, document_len: int) -> Layout: ...


@dataclass(frozen=True)
class PoSE(PositionSampler):
    """Positional skip-wise training, equations 3 to 5 of the paper.

    Chunk lengths are drawn one after the other, each leaving at least one token for every later
    chunk (the law of the paper's Figure 6: N=2 has l_0 ~ U{1..L-1}). Then, with st_i the tokens
    before chunk i,

        u_0 = 0, u_i ~ U{u_{i-1}..T-L}     positions of chunk i: u_i + st_i + (0..l_i-1)
        v_0 = 0, v_i ~ U{v_{i-1}..Lx-L}    text of chunk i:      x[v_i + st_i : v_i + st_i + l_i]

    Args:
        num_chunks: N >= 1. N = 1 keeps plain contiguous positions; N = L puts one token in a chunk.
        content: the v_i: "random" (equation 5), "contiguous" (v_i = 0) or "aligned" (v_i = u_i).

    Raises:
        ConfigError: num_chunks is not in [1, train_len], or content is unknown.
    """

    num_chunks: int = 2
    content: Literal["random", "contiguous", "aligned"] = "random"

    def __post_init__(self):
        super().__post_init__()
        _require_int("pose.num_chunks", self.num_chunks, at_least=1)
        if self.num_chunks > self.train_len:
            raise ConfigError(
                f"pose.num_chunks={self.num_chunks} is more than pose.train_len={self.train_len}: "
                "a chunk holds at least one token"
            )
        if self.content not in ("random", "contiguous", "aligned"):
            raise ConfigError(f"pose.content={self.content!r} is unknown: choose random, contiguous or aligned")

    @property
    def min_document_len(self) -> int:
        return self.target_len if self.content == "aligned" else self.train_len

    def _sample(self, rng, document_len):
        lengths = self._chunk_lengths(rng)
        u = _nondecreasing(rng, self.num_chunks, self.target_len - self.train_len)
        if self.content == "random":
            v = _nondecreasing(rng, self.num_chunks, document_len - self.train_len)
        elif self.content == "contiguous":
            v = np.zeros_like(u)
        else:
            v = u
        index = np.arange(self.train_len)
        return Layout(index + np.repeat(u, lengths), index + np.repeat(v, lengths))

    def _chunk_lengths(self, rng) -> np.ndarray:
        lengths = np.empty(self.num_chunks, np.int64)
        left = self.train_len
        for i in range(self.num_chunks - 1):
            lengths[i] = rng.integers(1, left - (self.num_chunks - 1 - i), endpoint=True)
            left -= lengths[i]
        lengths[-1] = left
        return lengths


@dataclass(frozen=True)
class Full(PositionSampler):
    """Full-length training, the expensive baseline: examples of target_len tokens, ids 0..T-1."""

    @property
    def example_len(self) -> int:
        return self.target_len

    def _sample(self, rng, document_len):
        index = np.arange(self.target_len)
        return Layout(index, index.copy())


@dataclass(frozen=True)
class ShortPI(PositionSampler):
    """The control that asks what the skips bring: the rescaled RoPE, but contiguous ids 0..L-1."""

    def _sample(self, rng, document_len):
        index = np.arange(self.train_len)
        return Layout(index, index.copy())


@dataclass(frozen=True)
class RandPos(PositionSampler):
    """Randomised positions (Ruoss et al. 2023, arXiv 2305.16843).

    The ids are a sorted sample of L from {0..T-1} without replacement; the text is contiguous.
    """

    def _sample(self, rng, document_len):
        positions = rng.choice(self.target_len, self.train_len, replace=False, shuffle=False)
        return Layout(np.sort(positions).astype(np.int64), np.arange(self.train_len))


def _nondecreasing(rng: np.random.Generator, num: int, high: int) -> np.ndarray:
    """0 = w_0 <= w_1 <= ... with w_i ~ U{w_{i-1}..high}; int64 [num] (equations 4 and 5)."""
    w = np.zeros(num, np.int64)
    for i in range(1, num):
        w[i] = rng.integers(w[i - 1], high, endpoint=True)
    return w


def _require_int(key: str, value, at_least: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{key}={value!r} is not accepted: give an integer of at least {at_least}")
