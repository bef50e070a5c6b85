"""Perplexity of long documents. Every mean is over tokens, never over windows or documents.

Lx tokens in a document, N in a window; a token at index i of a window is scored given tokens 0..i-1,
so the first of a window is never scored.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from pose.evaluation.scoring import Scorer
from pose.evaluation.task import Estimate, Metric, Task, are_numbers, describe, ratio

Sums = dict[str, list[float]]  # by metric: loss in nats, scored tokens and, for ppl@N, their bytes


class Perplexity(Task):
    """Perplexity at several window lengths, by position, and of sliding windows; a document is a unit.

    Metrics, N one of the lengths:
        ppl@N, bits_per_byte@N: `truncated`.
        position_ppl@A-B, tail_ppl@N: there too.
        sliding_ppl@N: `sliding`; with a stride.

    Args:
        documents: token arrays, each of at least max(lengths) tokens.
        ids: their names.
        lengths: the N, in tokens.
        token_bytes: int [vocabulary], UTF-8 bytes of each token (`pose.data.tokenizer.token_bytes`).
        windows: windows of the longest N per document.
        tail: last tokens of a window that `tail_ppl` scores; None for no such metric.
        bin: tokens in a bin of perplexity by position.
        stride: in tokens, at most min(lengths) - 1; None for no sliding windows.
        sliding_tokens: tokens of each document that the window slides over; None takes all.
        bos_id: put before every window, in place of its first token, when given.
    """

    name = "perplexity"

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        ids: Sequence[str],
        lengths: Sequence[int],
        *,
        token_bytes: np.ndarray,
        windows: int = 8,
        tail: int | None = 128,
        bin: int = 256,
        stride: int | None = None,
        sliding_tokens: int | None = None,
        bos_id: int | None = None,
    ):
        self.ids = {f"{i}:{name}": name for i, name in enumerate(ids)}
        self.documents = dict(zip(self.ids, documents, strict=True))
        self.lengths, self.token_bytes = sorted(set(lengths)), token_bytes
        self.windows, self.tail, self.bin = windows, tail, bin
        self.stride, self.sliding_tokens, self.bos_id = stride, sliding_tokens, bos_id

    def metrics(self) -> dict[str, Metric]:
        names = [f"{family}@{n}" for n in self.lengths for family in ("ppl", "bits_per_byte")]
        names += [f"tail_ppl@{n}" for n in with_tail(self.lengths, self.tail)]
        names += [f"position_ppl@{a}-{b}" for a, b in bins(self.lengths[-1], self.bin)]
        names += [f"sliding_ppl@{n}" for n in self.lengths if self.stride is not None]
        return {name: describe(name) for name in names}

    def units(self) -> dict[str, dict[str, Any]]:
        options = {
            "lengths": self.lengths, "windows": self.windows, "tail": self.tail, "bin": self.bin, "stride": self.stride,
            "sliding_tokens": self.sliding_tokens, "bos_id": self.bos_id, "token_bytes": _sha256(self.token_bytes),
        }  # fmt: skip
        return {
            unit: {"sha256": _sha256(document), "tokens": len(document), **options}
            for unit, document in self.documents.items()
        }

    def keep(self, ids: Collection[str]):
        """Leaves out all documents but these."""
        self.documents = {unit: document for unit, document in self.documents.items() if self.ids[unit] in ids}

    def measure(self, scorer: Scorer, unit: str) -> Sums:
        document = self.documents[unit]
        sums = truncated(
            scorer, document, self.lengths, token_bytes=self.token_bytes,
            windows=self.windows, tail=self.tail, bin=self.bin, bos_id=self.bos_id,
        )  # fmt: skip
        if self.stride is not None:
            cut = document[: self.sliding_tokens]
            sums |= sliding(scorer, cut, self.lengths, stride=self.stride, bos_id=self.bos_id)
        return sums

    def accepts(self, unit: str, outcome: Any) -> bool:
        names = [name for name in self.metrics() if not name.startswith("bits_per_byte")]
        return list(outcome) == names and all(
            are_numbers(sums, 3 if name.startswith("ppl@") else 2) and sums[1] > 0 for name, sums in outcome.items()
        )

    def summarise(self, outcomes: Mapping[str, Sums]) -> dict[str, Estimate]:
        estimates: dict[str, Estimate] = {}
        for name in dict.fromkeys(name for sums in outcomes.values() for name in sums):
            nll, tokens, *num_bytes = zip(*(sums[name] for sums in outcomes.values() if name in sums), strict=True)
            estimates[name] = ratio(nll, tokens, np.exp, least=0.0)  # no perplexity is below 1
            if num_bytes:
                bits = np.array(nll) / np.log(2)
                estimates[name.replace("ppl", "bits_per_byte")] = ratio(bits, num_bytes[0], least=0.0)
        return estimates


def truncated(
    scorer: Scorer,
    document: np.ndarray,
    lengths: Sequence[int],
    *,
    token_bytes: np.ndarray,
    windows: int,
    tail: int | None,
    bin: int,
    bos_id: int | None = None,
) -> Sums:
    """The losses of one document's windows: those of the longest N, evenly spaced, the first at the document's start.

    A token's loss does not depend on what follows it: so one forward pass of a window serves all shorter lengths
    (exactly, but for models whose frequencies depend on the length, which take a pass for each).

    Args:
        As `Perplexity`.

    Returns:
        ppl@N: every token after the first of the windows' first N, with its bytes.
        position_ppl@A-B: tokens at index A to B-1 of the windows of the longest N.
        tail_ppl@N: the last `tail` tokens of windows that end where the windows of the longest N end: the same tokens
            for every N, so that only their context differs. Lengths of no more than `tail` have none.
    """
    lengths = sorted(set(lengths))
    longest = lengths[-1]
    # Of a document that is hardly longer than one window several would score the same tokens again and again
    starts = spread(len(document) - longest, min(windows, -(-len(document) // longest)))
    whole = _nll(scorer, document, starts, longest, longest - 1, bos_id)
    sums: Sums = {}
    for n in lengths:
        nll = _nll(scorer, document, starts, n, n - 1, bos_id) if scorer.by_length and n < longest else whole
        scored = np.concatenate([document[start + 1 : start + n] for start in starts])
        sums[f"ppl@{n}"] = [*_sum(nll[:, : n - 1]), int(token_bytes[scored].sum())]
    if tail is not None:
        for n in with_tail(lengths, tail):
            later = [start + longest - n for start in starts]
            nll = whole if n == longest else _nll(scorer, document, later, n, tail, bos_id)
            sums[f"tail_ppl@{n}"] = _sum(nll[:, -tail:])
    for a, b in bins(longest, bin):
        sums[f"position_ppl@{a}-{b}"] = _sum(whole[:, max(a, 1) - 1 : b - 1])
    return sums


def sliding(
    scorer: Scorer, document: np.ndarray, lengths: Sequence[int], *, stride: int, bos_id: int | None = None
) -> Sums:
    """Sliding windows, as Press et al. 2021 (arXiv 2012.15832) and transformers' documentation have them.

    Windows of N begin at 0, stride, 2 stride, ..., and each scores the tokens that none before it has. The last one
    ends at the document's end, and is shorter where the stride does not divide. Windows of several N that begin at one
    place take one forward pass: the shorter are its beginning (but for models whose frequencies depend on the length).

    Returns:
        sliding_ppl@N: all of the document but its first token.
    """
    if scorer.by_length and len(lengths) > 1:
        return {k: v for n in lengths for k, v in sliding(scorer, document, [n], stride=stride, bos_id=bos_id).items()}
    spans: dict[int, list[tuple[int, int, int]]] = {}  # by start: N, and what it scores there, from the start
    for n in lengths:
        scored = 1
        for start in range(0, len(document), stride):
            end = min(start + n, len(document))
            spans.setdefault(start, []).append((n, scored - start, end - start))
            scored = end
            if end == len(document):
                break
    alike: dict[tuple[tuple[int, int, int], ...], list[int]] = {}  # these share batches
    for start, of_start in spans.items():
        alike.setdefault(tuple(of_start), []).append(start)
    sums: Sums = {f"sliding_ppl@{n}": [0.0, 0] for n in lengths}
    for scores, starts in alike.items():
        size = max(end for _, _, end in scores)
        places = np.unique(np.concatenate([np.arange(begin, end) for _, begin, end in scores]))
        nll = np.full((len(starts), size), np.nan)
        nll[:, places] = _nll(scorer, document, starts, size, places, bos_id)
        for n, begin, end in scores:
            name = f"sliding_ppl@{n}"
            sums[name] = [a + b for a, b in zip(sums[name], _sum(nll[:, begin:end]), strict=True)]
    return sums


def with_tail(lengths: Sequence[int], tail: int | None) -> list[int]:
    """The lengths that `tail_ppl` has: those of more than `tail` tokens."""
    return [] if tail is None else [n for n in lengths if n > tail]


def bins(longest: int, bin: int) -> list[tuple[int, int]]:
    """The bins [A, B) of perplexity by position that have a scored token, which the first of a window is not."""
    ends = [(a, min(a + bin, longest)) for a in range(0, longest, bin)]
    return [(a, b) for a, b in ends if b > 1]


def spread(last: int, num: int) -> list[int]:
    """num whole numbers, evenly spaced over 0..last, the first 0; one stands at 0. Repeats are left out."""
    return sorted({i * last // max(num - 1, 1) for i in range(num)})


def _nll(
    scorer: Scorer, document: np.ndarray, starts: Sequence[int], n: int, scored: int | np.ndarray, bos_id: int | None
) -> np.ndarray:
    """Losses of the scored tokens (`Scorer.nll`) of the windows of n tokens at starts; [starts, S]."""

    def window(start: int) -> np.ndarray:
        tokens = np.array(document[start : start + n])
        if bos_id is not None:
            tokens[0] = bos_id
        return tokens

    batches = scorer.batches(window(start) for start in starts)
    return np.concatenate([scorer.nll(batch, scored) for batch in batches])


def _sum(nll: np.ndarray) -> list[float]:
    return [float(nll.sum()), nll.size]


def _sha256(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()
