"""Intervals: against published values, and by how often they hold what they should."""

import math

import numpy as np
import pytest

from pose.evaluation.task import ratio, student_95, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Wilson's formula evaluated by hand; Newcombe 1998, table I: 81/263 and 15/148, 0/20
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilsons_interval(successes, trials, low, high):
    estimate = wilson(successes, trials)
    assert estimate.value == successes / trials and estimate.num == trials
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_a_ratio_is_weighted_by_its_denominators():
    estimate = ratio([10.0, 300.0, 20.0], [10, 100, 10], np.exp)
    assert estimate.value == pytest.approx(np.exp(330 / 120))
    rest = [10 - 27.5, 300 - 275, 20 - 27.5]  # over the line through the ratio; t of two degrees of freedom
    half = 4.3027 * math.sqrt(3 / 2 * sum(one**2 for one in rest)) / 120
    assert estimate.low == pytest.approx(np.exp(330 / 120 - half), rel=1e-4)
    assert estimate.high == pytest.approx(np.exp(330 / 120 + half), rel=1e-4)
    assert estimate.num == 3
    assert type(estimate.value) is float


def test_one_document_has_no_interval_nor_have_two():
    assert ratio([3.0], [2]) == (1.5, None, None, 1)
    assert ratio([3.0, 5.0], [2, 2]) == (2.0, None, None, 2)


@pytest.mark.parametrize("num", [3, 4, 5, 20, 40])
def test_the_interval_holds_the_mean_about_95_times_in_100(num):
    """Of few items too, and of items of different sizes."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        lengths = rng.integers(50, 200, num)
        losses = rng.normal(2.0, 0.5, num) * lengths
        estimate = ratio(losses, lengths)
        held += estimate.low <= 2.0 <= estimate.high
    assert 0.92 < held / 1000 < 0.98


def test_an_interval_of_equal_weights_is_students():
    estimate = ratio([1.0, 2.0, 4.0, 5.0], [1.0] * 4)
    half = 3.1824 * math.sqrt(10 / 3 / 4)  # t of 3 degrees of freedom times the standard error
    assert (estimate.low, estimate.high) == (pytest.approx(3 - half), pytest.approx(3 + half))


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # R 4: qt(0.975, df)
    [(1, 12.70620), (4, 2.77645), (5, 2.57058), (7, 2.36462), (19, 2.09302), (100, 1.98397), (10_000, 1.96020)],
)
def test_students_quantile(freedom, quantile):
    assert student_95(freedom) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # scipy 1.17.1: stats.t.ppf(0.975, df)
    [(2.16, 4.01121), (2.5, 3.57465), (3.7, 2.86752), (7.74, 2.31956)],
)
def test_students_quantile_of_welchs_degrees(freedom, quantile):
    """Not too small by more than rounding."""
    assert quantile - 5e-4 < student_95(freedom) < 1.025 * quantile


def test_a_bound_beyond_every_number_is_infinite():
    estimate = ratio([1.0, 1.0, 9000.0], [1, 1, 10], np.exp)
    assert estimate.low < 1e-20 and estimate.high == math.inf


def test_an_interval_is_cut_where_its_ratio_must_end():
    """A mean loss is at least 0, a perplexity at least 1."""
    items = [1.0, 2.0, 60.0], [10, 10, 10]
    free, cut = ratio(*items, np.exp), ratio(*items, np.exp, least=0.0)
    assert free.low < 1 and cut.low == 1.0 and (cut.value, cut.high) == (free.value, free.high)
