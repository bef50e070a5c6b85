"""What every measurement is: units of work whose outcomes can be kept, and estimates made of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pose.evaluation.scoring import Scorer

RESAMPLES = 1000  # of the bootstrap
NORMAL_95 = 1.959964  # standard normal quantile at 0.975


class Estimate(NamedTuple):
    """A metric and how sure it is.

    Attributes:
        value: the metric.
        low, high: its 95 % interval; None where one cannot be given (a single document).
        num: documents, prompts or questions it was made of.
    """

    value: float
    low: float | None = None
    high: float | None = None
    num: int = 1


class Task(ABC):
    """One thing to measure, divided into units: a document, a length, a benchmark.

    A unit's outcome is kept as soon as it is there, so that a killed evaluation goes on with the next one; it must be
    plain JSON, and a pure function of the model and of `units()[unit]`.
    """

    name: str
    lower_is_better = False  # of its metrics; perplexity's families are told by their names

    @abstractmethod
    def units(self) -> dict[str, dict[str, Any]]:
        """Everything, besides the model, that the outcome of each unit depends on, as plain JSON; in order."""

    def prepare(self) -> None:
        """Makes ready what else can fail before a model is loaded; nothing for most tasks."""
        return None

    @abstractmethod
    def measure(self, scorer: Scorer, unit: str) -> Any:
        """The outcome of one unit, as plain JSON."""

    @abstractmethod
    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        """The metrics by name, from the outcomes of all units."""


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927), which holds near 0 and 1 too."""
    p, z2 = successes / trials, NORMAL_95**2 / trials
    middle = (p + z2 / 2) / (1 + z2)
    half = NORMAL_95 * np.sqrt(p * (1 - p) / trials + z2 / (4 * trials)) / (1 + z2)
    return Estimate(p, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)), trials)


def ratio(numerators: Sequence[float], denominators: Sequence[float], transform=float) -> Estimate:
    """transform(sum of numerators / sum of denominators), with a percentile bootstrap over the items.

    Items are documents (losses over tokens) or prompts (scores over ones). The bootstrap draws items with
    replacement, RESAMPLES times, always the same draws; a single item has no interval.

    Args:
        numerators, denominators: one of each for an item.
        transform: an increasing function, such as exp.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value = transform(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(float(value), num=len(top))
    drawn = np.random.default_rng(0).integers(len(top), size=(RESAMPLES, len(top)))
    means = top[drawn].sum(1) / bottom[drawn].sum(1)
    low, high = (transform(bound) for bound in np.percentile(means, [2.5, 97.5]))
    return Estimate(float(value), float(low), float(high), len(top))
