"""The samplers of pose/positions.py: their exact law on tiny sizes, and what holds at any size."""

from collections import Counter
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from itertools import combinations, pairwise
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose.errors import ConfigError
from pose.positions import Full, PoSE, RandPos, ShortPI

# ----- the law -----


def chunk_lengths(train_len, num_chunks):
    """Figure 6 of the paper: yields (lengths, probability)."""
    if num_chunks == 1:
        yield (train_len,), Fraction(1)
        return
    longest = train_len - (num_chunks - 1)
    for first in range(1, longest + 1):
        for rest, probability in chunk_lengths(train_len - first, num_chunks - 1):
            yield (first, *rest), probability / longest


def biases(num_chunks, high):
    """w_0 = 0, w_i ~ U{w_{i-1}..high} (equations 4 and 5): yields (biases, probability)."""
    if num_chunks == 1:
        yield (0,), Fraction(1)
        return
    for head, probability in biases(num_chunks - 1, high):
        for last in range(head[-1], high + 1):
            yield (*head, last), probability / (high - head[-1] + 1)


def shifted(lengths, shifts):
    """Equations 3 to 5: chunk i holds shift_i + st_i + (0..l_i - 1)."""
    ids, start = [], 0
    for length, shift in zip(lengths, shifts, strict=True):
        ids += [shift + start + k for k in range(length)]
        start += length
    return tuple(ids)


def pose_law(train_len, target_len, document_len, num_chunks, content):
    """The probability of each (position_ids, content_ids), by enumeration."""
    law = Counter()
    for lengths, p_lengths in chunk_lengths(train_len, num_chunks):
        for u, p_u in biases(num_chunks, target_len - train_len):
            if content == "random":
                choices = list(biases(num_chunks, document_len - train_len))
            else:
                choices = [(u if content == "aligned" else (0,) * num_chunks, Fraction(1))]
            for v, p_v in choices:
                law[shifted(lengths, u), shifted(lengths, v)] += p_lengths * p_u * p_v
    return law


def draw_counts(sampler, document_len, num_draws, seed=0):
    rng = np.random.default_rng(seed)
    layouts = (sampler.sample(rng, document_len) for _ in range(num_draws))
    return Counter((tuple(x.position_ids.tolist()), tuple(x.content_ids.tolist())) for x in layouts)


def assert_follows(counts, law):
    """Pearson's chi-square stays below its 1 - 1e-6 quantile (Wilson and Hilferty's approximation)."""
    assert sum(law.values()) == 1
    assert counts.keys() <= law.keys(), "an outcome that cannot happen"
    num_draws = counts.total()
    expected = {outcome: float(p) * num_draws for outcome, p in law.items()}
    assert min(expected.values()) >= 5, "too few draws for a chi-square"
    if len(law) == 1:
        return
    chi_square = sum((counts[outcome] - e) ** 2 / e for outcome, e in expected.items())
    df = len(law) - 1
    assert chi_square < df * (1 - 2 / (9 * df) + 4.75 * sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize("content", ["random", "contiguous", "aligned"])
@pytest.mark.parametrize(
    ("train_len", "target_len", "document_len", "num_chunks"),
    [
        (4, 7, 7, 1),
        (4, 7, 7, 2),  # documents as long as the target
        (5, 7, 8, 2),  # longer
        (5, 7, 7, 3),
        (4, 6, 6, 4),  # one token in a chunk
        (3, 3, 5, 2),  # nothing to extend
    ],
)
def test_pose_draws_from_the_law_of_equations_3_to_5(train_len, target_len, document_len, num_chunks, content):
    sampler = PoSE(train_len, target_len, num_chunks=num_chunks, content=content)
    law = pose_law(train_len, target_len, document_len, num_chunks, content)
    assert_follows(draw_counts(sampler, document_len, 8_000), law)


@pytest.mark.parametrize("num_chunks", [2, 3])
def test_pose_draws_from_documents_shorter_than_the_target(num_chunks):
    """Positions and text have their own ranges: T - L = 3, Lx - L = 1."""
    law = pose_law(4, 7, 5, num_chunks, "random")
    assert_follows(draw_counts(PoSE(4, 7, num_chunks=num_chunks), 5, 8_000), law)


@pytest.mark.parametrize("document_len", [3, 9])
def test_randpos_is_uniform_over_subsets_and_keeps_the_text_contiguous(document_len):
    law = {(subset, (0, 1, 2)): Fraction(1, 35) for subset in combinations(range(7), 3)}
    assert_follows(draw_counts(RandPos(3, 7), document_len, 4_000), law)


def far_share_two_chunks(train_len, target_len):
    """E[share of causal pairs at distance >= L] of PoSE with N = 2, in closed form.

    A pair k tokens apart is split by the border with probability k / (L - 1), and is then u + k
    apart with u ~ U{0..T-L}.
    """
    length, high = train_len, target_len - train_len
    k = np.arange(1, length)
    split = k / (length - 1)
    far = np.maximum(high - (length - k) + 1, 0) / (high + 1)
    return ((length - k) * split * far).sum() / (length * (length - 1) / 2)


def far_share_randpos(train_len, target_len):
    """The same of RandPos: any two of its ids are a uniform pair of distinct ids below T."""
    return (target_len - train_len) * (target_len - train_len + 1) / (target_len * (target_len - 1))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(PoSE(2048, 16384), far_share_two_chunks(2048, 16384)), (RandPos(2048, 16384), far_share_randpos(2048, 16384))],
)
def test_share_of_pairs_beyond_the_window_at_the_size_of_the_paper(sampler, expected):
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(1_000):
        ids = sampler.sample(rng, 20_000).position_ids
        far = np.searchsorted(ids, ids - sampler.train_len, side="right").sum()
        shares.append(far / (len(ids) * (len(ids) - 1) / 2))
    assert np.mean(shares) == pytest.approx(expected, abs=5 * np.std(shares) / sqrt(len(shares)))


# ----- what holds at any size -----


@st.composite
def lengths(draw):
    train_len = draw(st.integers(1, 80))
    return train_len, train_len + draw(st.integers(0, 400))


@st.composite
def pose_draws(draw):
    """A valid PoSE sampler, and the length of a document long enough for it."""
    train_len, target_len = draw(lengths())
    content = draw(st.sampled_from(["random", "contiguous", "aligned"]))
    sampler = PoSE(train_len, target_len, num_chunks=draw(st.integers(1, train_len)), content=content)
    shortest = target_len if content == "aligned" else train_len
    return sampler, shortest + draw(st.integers(0, 400))


seeds = st.integers(0, 2**32 - 1)


def assert_valid(layout, length, target_len, document_len):
    for ids, end in ((layout.position_ids, target_len), (layout.content_ids, document_len)):
        assert ids.dtype == np.int64
        assert ids.shape == (length,)
        assert all(a < b for a, b in pairwise(ids.tolist()))
        assert ids[0] >= 0 and ids[-1] < end


@settings(deadline=None)
@given(pose_draws(), seeds)
def test_pose_is_chunks_of_both_positions_and_text(case, seed):
    """Positions and text are each shifted per chunk, by shifts that start at 0 and never go down."""
    sampler, document_len = case
    layout = sampler.sample(np.random.default_rng(seed), document_len)
    assert_valid(layout, sampler.train_len, sampler.target_len, document_len)
    index = np.arange(sampler.train_len)
    u, v = layout.position_ids - index, layout.content_ids - index
    assert u[0] == 0 and v[0] == 0
    steps_u, steps_v = np.diff(u), np.diff(v)
    assert (steps_u >= 0).all() and (steps_v >= 0).all()
    assert u[-1] <= sampler.target_len - sampler.train_len
    assert v[-1] <= document_len - sampler.train_len
    assert ((steps_u > 0) | (steps_v > 0)).sum() <= sampler.num_chunks - 1
    if sampler.content == "contiguous":
        assert (v == 0).all()
    if sampler.content == "aligned":
        assert (v == u).all()


@settings(deadline=None)
@given(lengths(), st.integers(0, 400), seeds)
def test_the_other_samplers_keep_the_text_contiguous(sizes, extra, seed):
    train_len, target_len = sizes
    for sampler, length in ((Full(*sizes), target_len), (ShortPI(*sizes), train_len), (RandPos(*sizes), train_len)):
        layout = sampler.sample(np.random.default_rng(seed), length + extra)
        assert_valid(layout, length, target_len, length + extra)
        assert layout.content_ids.tolist() == list(range(length))
        if not isinstance(sampler, RandPos):
            assert layout.position_ids.tolist() == list(range(length))


@settings(deadline=None, max_examples=30)
@given(pose_draws(), seeds)
def test_a_draw_is_a_function_of_the_generator_alone(case, seed):
    pose, document_len = case
    document_len = max(document_len, pose.target_len)
    for sampler in (pose, Full(pose.train_len, pose.target_len), RandPos(pose.train_len, pose.target_len)):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        first = sampler.sample(rngs[0], document_len)
        np.random.random(3)  # numpy's own state must not matter
        sampler.sample(np.random.default_rng(seed + 1), document_len)
        again = replace(sampler).sample(rngs[1], document_len)
        assert np.array_equal(first.position_ids, again.position_ids)
        assert np.array_equal(first.content_ids, again.content_ids)
        assert rngs[0].bit_generator.state == rngs[1].bit_generator.state


@pytest.mark.parametrize("sampler", [PoSE(4, 9, content="aligned"), Full(4, 9), ShortPI(4, 9), RandPos(4, 9)])
def test_positions_and_text_are_arrays_of_their_own(sampler):
    """Changing one in place does not change the other, nor the next draw."""
    layout = sampler.sample(np.random.default_rng(0), 9)
    content = layout.content_ids.copy()
    layout.position_ids[:] += 100
    assert np.array_equal(layout.content_ids, content)
    assert sampler.sample(np.random.default_rng(0), 9).position_ids.max() < 9


def test_samplers_are_immutable_and_compare_by_value():
    sampler = PoSE(4, 9)
    assert sampler == PoSE(4, 9, num_chunks=2, content="random")
    with pytest.raises(FrozenInstanceError):
        sampler.num_chunks = 3
    with pytest.raises(ConfigError):
        replace(sampler, num_chunks=5)


# ----- lengths and errors -----


@pytest.mark.parametrize(
    ("sampler", "example_len", "min_document_len"),
    [
        (PoSE(4, 9), 4, 4),
        (PoSE(4, 9, content="contiguous"), 4, 4),
        (PoSE(4, 9, content="aligned"), 4, 9),
        (Full(4, 9), 9, 9),
        (ShortPI(4, 9), 4, 4),
        (RandPos(4, 9), 4, 4),
    ],
)
def test_a_document_of_the_least_length_will_do_and_a_shorter_one_will_not(sampler, example_len, min_document_len):
    assert (sampler.example_len, sampler.min_document_len) == (example_len, min_document_len)
    rng = np.random.default_rng(0)
    for _ in range(50):
        layout = sampler.sample(rng, min_document_len)
        assert len(layout.position_ids) == example_len
        assert layout.content_ids[-1] < min_document_len
    with pytest.raises(ValueError) as error:
        sampler.sample(rng, min_document_len - 1)
    for part in (f"{min_document_len - 1} tokens", sampler.name, f"needs {min_document_len}"):
        assert part in str(error.value)


@pytest.mark.parametrize("sampler_class", [PoSE, Full, ShortPI, RandPos])
@pytest.mark.parametrize("key", ["train_len", "target_len"])
@pytest.mark.parametrize("value", [0, -4, True, 4.0, "4", None])
def test_a_length_that_is_no_positive_integer_is_refused(sampler_class, key, value):
    with pytest.raises(ConfigError) as error:
        sampler_class(**{"train_len": 4, "target_len": 9, key: value})
    for part in (f"pose.{key}={value!r}", "integer of at least 1"):
        assert part in str(error.value)


@pytest.mark.parametrize("sampler_class", [PoSE, Full, ShortPI, RandPos])
def test_a_target_below_the_training_length_is_refused(sampler_class):
    with pytest.raises(ConfigError) as error:
        sampler_class(9, 8)
    for part in ("pose.target_len=8", "pose.train_len=9", "at least the training length"):
        assert part in str(error.value)
    assert sampler_class(9, 9).target_len == 9


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_a_number_of_chunks_that_is_no_positive_integer_is_refused(value):
    with pytest.raises(ConfigError) as error:
        PoSE(4, 9, num_chunks=value)
    for part in (f"pose.num_chunks={value!r}", "integer of at least 1"):
        assert part in str(error.value)


def test_more_chunks_than_tokens_are_refused():
    with pytest.raises(ConfigError) as error:
        PoSE(4, 9, num_chunks=5)
    for part in ("pose.num_chunks=5", "pose.train_len=4", "a chunk holds at least one token"):
        assert part in str(error.value)
    assert PoSE(4, 9, num_chunks=4).num_chunks == 4


@pytest.mark.parametrize("value", ["Random", "", None, 0])
def test_an_unknown_content_is_refused(value):
    with pytest.raises(ConfigError) as error:
        PoSE(4, 9, content=value)
    assert f"pose.content={value!r}" in str(error.value)
    for accepted in ("random", "contiguous", "aligned"):
        assert accepted in str(error.value)
