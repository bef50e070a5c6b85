"""The interface of a measurement: units of work with outcomes that can be kept, metrics known beforehand, estimates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pose.evaluation.scoring import Scorer

NORMAL_95 = 1.959964  # standard normal quantile at 0.975
# That of Student's t, of 1 to 8 degrees of freedom
STUDENT_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)


class Estimate(NamedTuple):
    """The value of a metric, with its confidence interval.

    Attributes:
        value: the metric.
        low, high: its 95 % interval; None where one cannot be given (a single document).
        num: documents, prompts or questions it was made of.
    """

    value: float
    low: float | None = None
    high: float | None = None
    num: int = 1


@dataclass(frozen=True)
class Metric:
    """What a metric is, told before anything is measured.

    Attributes:
        title: in tables.
        higher_is_better: None where that is not known.
        format: of a value; one that ends in % is of a share, in [0, 1].
        format_below_10: of a value that has a digit less; "" where it is the same.
    """

    title: str
    higher_is_better: bool | None = True
    format: str = ".0%"
    format_below_10: str = ""

    @property
    def is_share(self) -> bool:
        """Whether its values lie in [0, 1], and are read as percentages."""
        return self.format.endswith("%")

    def show(self, value: float) -> str:
        """A value as tables have it. A value outside [0, 1] is never shown as a percentage."""
        if self.is_share:
            return f"{value:{self.format}}" if 0 <= value <= 1 else f"{value:.4g}"
        if self.format_below_10 and abs(value) < 9.995:
            return f"{value:{self.format_below_10}}"
        return f"{value:{self.format}}" if abs(value) < 1e4 else f"{value:.1e}"


# By family, which is what a name has before its @. Stored results have nothing but names.
FAMILIES = {
    "ppl": Metric("perplexity", False, ".1f", ".2f"),
    "tail_ppl": Metric("perplexity of the last tokens", False, ".1f", ".2f"),
    "sliding_ppl": Metric("sliding-window perplexity", False, ".1f", ".2f"),
    "position_ppl": Metric("perplexity by position", False, ".1f", ".2f"),
    "bits_per_byte": Metric("bits per byte", False, ".3f"),
    "passkey": Metric("passkey"),
    "needle": Metric("needle"),
    "needle_gain": Metric("needle gain (nats per token)", True, ".3f"),
    "needle_gain_kept": Metric("needle gain kept", True, ".2f"),  # may be below 0 and above 1
    "ruler": Metric("RULER"),
}
ACCURACY = Metric("accuracy", True, ".1%")  # of a standard benchmark
SCORE = Metric("score", None, ".3f")  # of a benchmark whose name does not tell what it measures
# The paper's benchmarks, which are known to have accuracies.
BENCHMARKS = ("arc_challenge", "hellaswag", "boolq", "piqa", "winogrande", "truthfulqa_mc2")


def describe(name: str) -> Metric:
    """What is known of a metric from its name alone, such as needle@2048/0.5 and harness/boolq."""
    family, _, task = name.partition("@")[0].partition("/")
    if family == "harness":
        return replace(ACCURACY if task in BENCHMARKS else SCORE, title=task)
    if family not in FAMILIES:
        return Metric(name.partition("@")[0], None, ".4g")
    return replace(FAMILIES[family], title=f"{family}/{task}") if task else FAMILIES[family]


def shown(name: str, value: float, metrics: Mapping[str, Metric] | None = None) -> str:
    """A value of a metric as tables have it.

    Args:
        name: of the metric.
        value: of it.
        metrics: those of the tasks that measured (`Task.metrics`), which know more than a name tells.
    """
    return ((metrics or {}).get(name) or describe(name)).show(value)


class Task(ABC):
    """One thing to measure, divided into units: a document, a length, a benchmark.

    A unit's outcome is kept as soon as it is there, so that a killed evaluation goes on with the next one; it must be
    plain JSON, and a pure function of the model and of `units()[unit]`.
    """

    name: str

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Exactly the metrics that `summarise` gives, by name, in its order; known before anything is measured."""

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
    def accepts(self, unit: str, outcome: Any) -> bool:
        """Whether a kept outcome has the shape of what `measure` gives; of a wrong one it may also raise an error."""

    @abstractmethod
    def summarise(self, outcomes: Mapping[str, Any]) -> dict[str, Estimate]:
        """The metrics by name, from the outcomes of all units."""


class TaskByLength(Task):
    """A task whose units are lengths.

    Args:
        lengths: in tokens, in any order.

    Attributes:
        lengths: sorted, each once.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = sorted(set(lengths))

    @abstractmethod
    def depends(self) -> dict[str, Any]:
        """Everything, besides model and length, that an outcome depends on, as plain JSON."""

    def units(self) -> dict[str, dict[str, Any]]:
        depends = self.depends()
        return {str(length): {"length": length, **depends} for length in self.lengths}


def are_numbers(values: Any, num: int | None = None) -> bool:
    """Whether values are a list of numbers, `num` of them where that is given."""
    return (
        isinstance(values, list)
        and (num is None or len(values) == num)
        and all(isinstance(value, Real) and not isinstance(value, bool) for value in values)
    )


def are_verdicts(values: Any, num: int) -> bool:
    """Whether values are a list of `num` times 0 or 1."""
    return are_numbers(values, num) and set(values) <= {0, 1}


def are_shares(values: Any, num: int) -> bool:
    """Whether values are a list of `num` numbers in [0, 1]."""
    return are_numbers(values, num) and all(0 <= value <= 1 for value in values)


def wilson(successes: float, trials: int) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927), which holds near 0 and 1 too.

    Args:
        successes: of trials; of trials that can succeed in part the sum of their shares, whose interval is then too
            wide rather than too narrow: no variance of shares is larger than that of as many successes.
        trials: at least one.
    """
    p, z2 = successes / trials, NORMAL_95**2 / trials
    middle = (p + z2 / 2) / (1 + z2)
    half = NORMAL_95 * np.sqrt(p * (1 - p) / trials + z2 / (4 * trials)) / (1 + z2)
    return Estimate(p, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)), trials)


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    transform: Callable[[float], float] = float,
    least: float = -math.inf,
) -> Estimate:
    """transform(sum of numerators / sum of denominators), with an interval over the items.

    Items are documents (losses over tokens) or prompts (gains over ones). The standard error is that of the linearised
    ratio (Cochran 1977, Sampling Techniques, 6.3), the quantile Student's. One or two items have no interval: that of
    two would be 12.7 standard errors, which says nothing and hides what is drawn beside it. (A percentile bootstrap of
    few items is too narrow: docs/LOG.md.)

    Args:
        numerators, denominators: one of each for an item.
        transform: an increasing function, such as exp.
        least: what the ratio cannot be below, where the interval is cut.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    num, of_all = len(top), bottom.sum()
    value = top.sum() / of_all
    with np.errstate(over="ignore"):  # exp of a bound that few documents cannot give
        if num < 3:
            return Estimate(float(transform(value)), num=num)
        half = student_95(num - 1) * np.sqrt(num / (num - 1) * ((top - value * bottom) ** 2).sum()) / of_all
        low, high = (float(transform(bound)) for bound in (max(value - half, least), value + half))
        return Estimate(float(transform(value)), low, high, num)


def student_95(freedom: float) -> float:
    """The quantile at 0.975 of Student's t; to 5e-4.

    By the expansion around the normal quantile (Abramowitz and Stegun 1964, 26.7.5), which for fewer than eight degrees
    of freedom is too coarse. Between whole numbers below that it is interpolated in 1/freedom, and up to 2 % too large.

    Args:
        freedom: degrees of it, at least 1.
    """
    if freedom <= len(STUDENT_95):
        whole = math.ceil(freedom)
        share = 0.0 if whole == freedom else (1 / freedom - 1 / whole) / (1 / (whole - 1) - 1 / whole)
        return STUDENT_95[whole - 1] + share * (STUDENT_95[max(whole - 2, 0)] - STUDENT_95[whole - 1])
    z = NORMAL_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
