"""Perplexity of long documents. Every mean is over tokens, never over windows or documents.

Lx tokens in a document, N in a window; a token at index i of a window is scored given tokens 0..i-1,
so the first of a window is never scored.
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pose.evaluation.scoring import Scorer


class Mean:
    """A running mean of losses, weighted by tokens."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, nll: np.ndarray):
        """Adds losses in nats, of any shape."""
        self.total += float(nll.sum())
        self.count += nll.size

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(self.total / self.count))


def spread(last: int, num: int) -> list[int]:
    """num whole numbers, evenly spaced over 0..last, the first 0; one stands at 0. Repeats are left out."""
    return sorted({i * last // max(num - 1, 1) for i in range(num)})


def truncated_perplexity(
    scorer: Scorer,
    documents: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    windows: int,
    tail: int,
    bin: int,
    bos_id: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Perplexity at several window lengths.

    Args:
        scorer: of the model.
        documents: token arrays, each of at least max(lengths) tokens.
        lengths: the N.
        windows: windows per document and length.
        tail: last tokens of a window that `tail_ppl` scores; lengths of no more have none.
        bin: tokens in a bin of perplexity by position.
        bos_id: put before every window, in place of its first token, when given.
        progress: whether to show a bar.

    Returns:
        ppl@N: every token after the first, of windows evenly spaced over the document, the first at
            its start.
        tail_ppl@N: the last `tail` tokens of windows that end where the windows of the longest N
            end: the same tokens for every N, so that only their context differs.
        position_ppl@A-B: tokens at index A to B-1 of the windows of the longest N.
    """
    longest = max(lengths)
    means: dict[str, Mean] = {}
    bar = tqdm(total=len(documents) * len(lengths), desc="Perplexity", unit="pass", leave=False, disable=not progress)
    for document in documents:
        ends = [start + longest for start in spread(len(document) - longest, windows)]
        for n in lengths:
            starts = spread(len(document) - n, windows)
            tails = [end - n for end in ends]
            nll = _score(scorer, document, sorted({*starts, *tails}), n, n - 1, bos_id)
            for start in starts:
                means.setdefault(f"ppl@{n}", Mean()).add(nll[start])
                if n == longest:
                    for a in range(0, n, bin):
                        b = min(a + bin, n)
                        means.setdefault(f"position_ppl@{a}-{b}", Mean()).add(nll[start][max(a, 1) - 1 : b - 1])
            if n > tail:
                for start in tails:
                    means.setdefault(f"tail_ppl@{n}", Mean()).add(nll[start][-tail:])
            bar.update()
    bar.close()
    return {name: mean.perplexity for name, mean in means.items() if mean.count}


def sliding_perplexity(
    scorer: Scorer,
    documents: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    stride: int,
    max_tokens: int | None = None,
    bos_id: int | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Sliding-window perplexity (Press et al. 2021, arXiv 2012.15832).

    The first window scores all its tokens but the first, each later one ends `stride` tokens
    further and scores those it adds; the last ends at the document's end.

    Args:
        scorer, documents, lengths, bos_id, progress: as `truncated_perplexity`.
        stride: in tokens, at most the shortest length minus 1.
        max_tokens: of each document; None takes all.

    Returns:
        sliding_ppl@N for each N.
    """
    means = {n: Mean() for n in lengths}
    bar = tqdm(total=len(documents) * len(lengths), desc="Sliding", unit="pass", leave=False, disable=not progress)
    for document in documents:
        document = document[:max_tokens]
        for n in lengths:
            last = len(document) - n
            means[n].add(_score(scorer, document, [0], n, n - 1, bos_id)[0])
            whole = list(range(stride, last + 1, stride))
            for nll in _score(scorer, document, whole, n, stride, bos_id).values():
                means[n].add(nll)
            rest = last - (whole[-1] if whole else 0)
            if rest:
                means[n].add(_score(scorer, document, [last], n, rest, bos_id)[last])
            bar.update()
    bar.close()
    return {f"sliding_ppl@{n}": mean.perplexity for n, mean in means.items()}


def _score(
    scorer: Scorer, document: np.ndarray, starts: Sequence[int], n: int, num_scored: int, bos_id: int | None
) -> dict[int, np.ndarray]:
    """Losses of the last num_scored tokens of the windows of n tokens at starts; {start: [num_scored]}."""

    def window(start: int) -> np.ndarray:
        tokens = np.array(document[start : start + n])
        if bos_id is not None:
            tokens[0] = bos_id
        return tokens

    rows = [scorer.nll(batch, num_scored) for batch in scorer.batches(window(start) for start in starts)]
    return dict(zip(starts, np.concatenate(rows), strict=True)) if rows else {}
