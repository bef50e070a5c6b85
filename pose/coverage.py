"""What a position sampler covers: which relative distances its examples contain, and how often.

python -m pose.coverage [pose=NAME] [pose.train_len=L] [pose.target_len=T] [beside=[NAME,...]]

L, T as in `pose.positions`; a distance d in {1..T-1} is the difference of the position ids of a causal pair of
tokens. An example of n tokens has n (n-1) / 2 pairs.

Closed forms. Of n contiguous ids every distance below n occurs, in n - d pairs. Two chunks of l and L - l tokens, the
second shifted by u ~ U{0..H}, H = T - L, independent of l:

* Within the chunks d occurs iff d < max(l, L - l): probability a(d), over the law of l.
* A pair of tokens k apart in the example is split by the border for n_l(k) = min(k, L - k, l, L - l) pairs, never 0
  for k in {1..L-1}, and is then k + u apart. So d occurs across the border iff 1 <= d - u <= L - 1, whatever l is:
  probability c(d) = |{0..H} and {d-L+1..d-1}| / (H + 1).
* Both are independent: P(d) = 1 - (1 - a(d)) (1 - c(d)).
* Of the L - k pairs k apart, the split ones are spread over H + 1 distances, so the mean number of pairs at d is
  (L - d) - n(d) + sum over k in {1..L-1} with 0 <= d - k <= H of n(k) / (H + 1), with n(k) the mean of n_l(k) over l.

Any two ids of RandPos are a uniform pair of distinct ids below T, so its share of pairs at d is (T - d) over
T (T-1) / 2. A mix has the mean of what it mixes. EndAnchor has one layout, whose pairs are counted. All else is
sampled: pairs by distance are the autocorrelation of the vector that is 1 at the ids of an example, taken by a Fourier
transform.
"""

if __name__ == "__main__":  # before what takes seconds to import
    import runpy

    runpy.run_module("pose.app.coverage", run_name="__main__")
    raise SystemExit

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pose.errors import ConfigError
from pose.files import atomic_file
from pose.positions import EndAnchor, Full, Mix, PoSE, PositionSampler, RandPos, Released, ShortPI, SingleShift

MAX_SAMPLES = 2000
SAMPLED_IDS = 2**26  # target_len times the number of samples: seconds


@dataclass(frozen=True)
class Coverage:
    """What a sampler covers; all arrays are [T-1], entry i is distance i + 1.

    Attributes:
        distance: int64, 1..T-1.
        probability: float64, that an example contains the distance.
        probability_error: float64, its standard error; 0 where exact.
        pair_share: float64, the share of all causal pairs that are at the distance; adds up to 1.
        pair_share_error: float64, its standard error; 0 where exact.
        train_len: L, tokens.
        target_len: T, tokens.
        num_samples: examples drawn; 0 where both are exact.
    """

    distance: np.ndarray
    probability: np.ndarray
    probability_error: np.ndarray
    pair_share: np.ndarray
    pair_share_error: np.ndarray
    train_len: int
    target_len: int
    num_samples: int

    @property
    def probability_exact(self) -> bool:
        """Whether probability is a closed form."""
        return not self.probability_error.any()

    @property
    def pair_share_exact(self) -> bool:
        """Whether pair_share is a closed form."""
        return not self.pair_share_error.any()

    def summary(self) -> dict[str, float]:
        """A few figures over the distances from L on, and over the last L distances; empty where T = L."""
        beyond = self.distance >= self.train_len
        if not beyond.any():
            return {}
        return {
            "probability_beyond_window": float(self.probability[beyond].mean()),
            "probability_last_window": float(self.probability[-self.train_len :].mean()),
            "pair_share_beyond_window": float(self.pair_share[beyond].sum()),
        }

    def save_csv(self, path: str | Path):
        """Writes the columns distance, probability, pair_share in one step: one row for each distance."""
        columns = np.column_stack([self.distance, self.probability, self.pair_share])
        header = "distance,probability,pair_share"
        with atomic_file(path) as file:
            np.savetxt(file, columns, fmt=["%d", "%.6g", "%.6g"], delimiter=",", header=header, comments="")


def coverage(sampler: PositionSampler, num_samples: int | None = None, seed: int = 0) -> Coverage:
    """What a sampler covers: exact where a closed form is known, else from examples drawn.

    Args:
        sampler: any; its text plays no part, and sentences are those it makes up. Of one with a curriculum this is what
            it covers at its last target.
        num_samples: examples to draw where there is no closed form; None takes 2,000, and fewer beyond 32,768
            positions, so that it stays a matter of seconds.
        seed: of the examples.

    Raises:
        ConfigError: num_samples is below 2, or seed below 0.
    """
    if num_samples is None:
        num_samples = min(MAX_SAMPLES, SAMPLED_IDS // sampler.target_len + 2)
    for name, value, least in (("num_samples", num_samples, 2), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} is not accepted: give an integer of at least {least}")
    L, T = sampler.train_len, sampler.target_len
    if type(sampler) is Mix:
        share, other = sampler.plain_share, coverage(sampler.sampler, num_samples, seed)
        probability, pairs = _contiguous(L, T)
        return Coverage(
            other.distance,
            share * probability + (1 - share) * other.probability,
            (1 - share) * other.probability_error,
            share * _share(pairs, L) + (1 - share) * other.pair_share,
            (1 - share) * other.pair_share_error,
            L, T, other.num_samples,
        )  # fmt: skip
    distance, zero = np.arange(1, T), np.zeros(T - 1)
    closed = _closed_form(sampler)
    if closed is not None:
        probability, pairs = closed
        return Coverage(distance, probability, zero, _share(pairs, sampler.example_len), zero, L, T, 0)
    probability, probability_error, pairs, pairs_error = _sampled(sampler, num_samples, seed)
    if type(sampler) is RandPos:
        pairs, pairs_error = (T - distance) * (L * (L - 1)) / (T * (T - 1)), zero
    n = sampler.example_len
    return Coverage(
        distance, probability, probability_error, _share(pairs, n), _share(pairs_error, n), L, T, num_samples
    )


def _closed_form(sampler: PositionSampler) -> tuple[np.ndarray, np.ndarray] | None:
    """Probability and mean number of pairs by distance, float64 [T-1] each; None where no closed form is known.

    A subclass may draw otherwise, so the class itself decides.
    """
    L, T = sampler.train_len, sampler.target_len
    if type(sampler) is Full:
        return _contiguous(T, T)
    if type(sampler) in (ShortPI, SingleShift) or (type(sampler) is PoSE and sampler.num_chunks == 1):
        return _contiguous(L, T)
    if type(sampler) is PoSE and sampler.num_chunks == 2:
        return _two_chunks(L, T, longest_first=L - 1)
    if type(sampler) is EndAnchor:
        ids = sampler.sample(np.random.default_rng(0), sampler.min_document_len).position_ids
        pairs = pairs_by_distance(ids, T)
        return np.minimum(pairs, 1), pairs
    if type(sampler) is Released:
        return _two_chunks(L, T, longest_first=(L + 1) // 2)
    return None


def _contiguous(num_ids: int, target_len: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.maximum(num_ids - np.arange(1.0, target_len), 0)
    return np.minimum(pairs, 1), pairs


def _two_chunks(train_len: int, target_len: int, longest_first: int) -> tuple[np.ndarray, np.ndarray]:
    """The closed form at the head of this file, with l ~ U{1..longest_first}."""
    L, H = train_len, target_len - train_len
    d, k = np.arange(1, target_len), np.arange(1, L)
    first = np.arange(1, longest_first + 1)
    longer, shorter = np.maximum(first, L - first), np.minimum(first, L - first)

    within = 1 - np.bincount(longer, minlength=target_len + 1).cumsum()[1:target_len] / longest_first
    across = np.maximum(np.minimum(d - 1, H) - np.maximum(d - L + 1, 0) + 1, 0) / (H + 1)

    at_least = 1 - np.bincount(shorter, minlength=L).cumsum()[: L - 1] / longest_first  # P(shorter >= k)
    mean_of_min = np.append(0, at_least.cumsum())  # E[min(q, shorter)], q from 0 on
    split = mean_of_min[np.minimum(k, L - k)]
    up_to = np.append(0, split.cumsum())
    pairs = (up_to[np.minimum(d, L - 1)] - up_to[np.clip(d - H - 1, 0, L - 1)]) / (H + 1)
    pairs[: L - 1] += L - k - split
    return 1 - (1 - within) * (1 - across), pairs


def _sampled(sampler: PositionSampler, num_samples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Probability, its error, mean number of pairs, its error; float64 [T-1] each."""
    rng, T = np.random.default_rng(seed), sampler.target_len
    present, total, squares = np.zeros(T - 1), np.zeros(T - 1), np.zeros(T - 1)
    for _ in range(num_samples):
        pairs = pairs_by_distance(sampler.sample(rng, sampler.min_document_len).position_ids, T)
        present += pairs > 0
        total += pairs
        squares += pairs * pairs
    smoothed = (present + 1) / (num_samples + 2)  # so that what was never, or always, seen has an error too
    probability_error = np.sqrt(smoothed * (1 - smoothed) / num_samples)
    mean = total / num_samples
    variance = np.maximum(squares - num_samples * mean**2, 0) / (num_samples - 1)
    return present / num_samples, probability_error, mean, np.sqrt(variance / num_samples)


def pairs_by_distance(position_ids: np.ndarray, target_len: int) -> np.ndarray:
    """The number of pairs of an example at each distance.

    Args:
        position_ids: int64 [n], all different, in [0, T).
        target_len: T.

    Returns:
        float64 [T-1], whole numbers; entry i is distance i + 1.
    """
    occupied = np.zeros(2 * target_len)
    occupied[position_ids] = 1
    spectrum = np.fft.rfft(occupied)
    pairs = np.fft.irfft(spectrum.real**2 + spectrum.imag**2, 2 * target_len)[1:target_len]
    return np.rint(pairs) + 0.0  # no -0


def _share(pairs: np.ndarray, num_tokens: int) -> np.ndarray:
    return pairs / max(num_tokens * (num_tokens - 1) / 2, 1)
