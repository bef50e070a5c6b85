"""Intervals: against published values, and by how often they hold what they should."""

import numpy as np
import pytest

from pose.evaluation.task import ratio, wilson


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
    estimate = ratio([10.0, 300.0], [10, 100], np.exp)
    assert estimate.value == pytest.approx(np.exp(310 / 110))
    assert estimate.low == pytest.approx(np.exp(1.0)) and estimate.high == pytest.approx(np.exp(3.0))
    assert estimate.num == 2
    assert type(estimate.value) is float


def test_one_document_has_no_interval():
    assert ratio([3.0], [2]) == (1.5, None, None, 1)


def test_the_bootstrap_holds_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        lengths = rng.integers(50, 200, 40)
        losses = rng.normal(2.0, 0.5, 40) * lengths
        estimate = ratio(losses, lengths)
        held += estimate.low <= 2.0 <= estimate.high
    assert 0.90 < held / 400 < 0.98


def test_resamples_are_weighted_too():
    """One long item and many short ones: resamples have from none of the long one to several."""
    estimate = ratio([1000.0, *[0.0] * 9], [1000, *[1] * 9])
    assert estimate.low == 0 and estimate.high > 0.99 and estimate.value == pytest.approx(1000 / 1009)


def test_the_same_outcomes_have_the_same_interval():
    losses = np.random.default_rng(3).random(50)
    assert ratio(losses, np.ones(50)) == ratio(losses, np.ones(50))
