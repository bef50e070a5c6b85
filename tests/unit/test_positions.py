"""The samplers of pose/positions.py: their exact law on tiny sizes, and what holds at any size."""

from collections import Counter
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from itertools import combinations, pairwise, product
from math import erf, floor, inf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pose import positions
from pose.errors import ConfigError
from pose.positions import (
    Cream,
    EndAnchor,
    EqualChunks,
    Full,
    Mix,
    PoSE,
    PositionSampler,
    RandPos,
    Released,
    SentenceSkip,
    ShortPI,
    SingleShift,
    Stratified,
)

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


def draw_counts(sampler, document_len, num_draws, seed=0, breaks=None):
    rng = np.random.default_rng(seed)
    layouts = (sampler.sample(rng, document_len, breaks) for _ in range(num_draws))
    return Counter((tuple(x.position_ids.tolist()), tuple(x.content_ids.tolist())) for x in layouts)


def assert_follows(counts, law):
    """Pearson's chi-square stays below its 1 - 1e-4 quantile (Wilson and Hilferty's approximation)."""
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    assert counts.keys() <= law.keys(), "an outcome that cannot happen"
    num_draws = counts.total()
    expected = {outcome: float(p) * num_draws for outcome, p in law.items()}
    assert min(expected.values()) >= 5, "too few draws for a chi-square"
    if len(law) == 1:
        return
    chi_square = sum((counts[outcome] - e) ** 2 / e for outcome, e in expected.items())
    df = len(law) - 1
    assert chi_square < df * (1 - 2 / (9 * df) + 3.72 * sqrt(2 / (9 * df))) ** 3


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


@pytest.mark.parametrize(
    ("train_len", "target_len", "document_len"),
    [
        (5, 8, 9),
        (6, 8, 6),  # a document of just L tokens: contiguous text
        (4, 6, 25),  # longer than 5 L: the rest is never seen
        (4, 4, 6),  # nothing to extend
        (2, 4, 5),
    ],
)
def test_released_draws_as_the_released_code(train_len, target_len, document_len):
    """From the paper's facts on the code: n = L, r ~ U{1..(n+1)//2}, e ~ U{n..min(Lx, 5n)}, s ~ U{0..T-n}."""
    law, x = Counter(), list(range(document_len))[: 5 * train_len]
    firsts, ends = range(1, (train_len + 1) // 2 + 1), range(train_len, len(x) + 1)
    shifts = range(target_len - train_len + 1)
    for r, e, s in product(firsts, ends, shifts):
        ids = tuple(i + s * (i >= r) for i in range(train_len))
        law[ids, (*x[:r], *x[e - (train_len - r) : e])] += Fraction(1, len(firsts) * len(ends) * len(shifts))
    assert_follows(draw_counts(Released(train_len, target_len), document_len, 8_000), law)


@pytest.mark.parametrize(
    ("target_len", "lengths"), [(9, (2, 2, 2)), (7, (1, 2, 2)), (6, (1, 1, 1, 1)), (4, (2, 2)), (5, (3,))]
)
def test_equal_chunks_share_a_budget(target_len, lengths):
    """Each later chunk takes delta ~ U{0..B} of the budget B that is left."""
    train_len, law = sum(lengths), Counter()

    def spend(ids, rest, taken, budget, probability):
        if not rest:
            law[tuple(ids), tuple(range(train_len))] += probability
            return
        for delta in range(budget + 1) if ids else (0,):
            chunk = [taken + delta + len(ids) + k for k in range(rest[0])]
            share = Fraction(1, budget + 1) if ids else 1
            spend(ids + chunk, rest[1:], taken + delta, budget - delta, probability * share)

    spend([], lengths, 0, target_len - train_len, Fraction(1))
    sampler = EqualChunks(train_len, target_len, num_chunks=len(lengths))
    assert_follows(draw_counts(sampler, train_len + 3, 8_000), law)


def stratified_law(train_len, target_len, num_chunks):
    """By the definition: a stratum's uniform point falls on a whole number with the length of what they share."""
    high, num_short = target_len - train_len, num_chunks - 1
    shortest, longest = -(-train_len // 4), min(3 * train_len // 4, train_len - num_short)
    law = Counter()
    for long in range(shortest, longest + 1):
        ends = [i * (train_len - long) // num_short for i in range(num_chunks)]
        lengths = [long, *(b - a for a, b in pairwise(ends))]
        width = Fraction(high + long + 1, num_short)
        strata = []
        for i in range(num_short):
            chances = Counter()
            for k in range(high + long + 1):
                shared = min((i + 1) * width, k + 1) - max(i * width, k)
                chances[min(k, high)] += max(shared, 0) / width
            strata.append([(k, chance) for k, chance in chances.items() if chance])
        for drawn in product(*strata):
            probability = Fraction(1, 2 * (longest - shortest + 1))
            for _, chance in drawn:
                probability *= chance
            skips = [0, *(k for k, _ in drawn)]
            law[shifted(lengths, skips)] += probability
            law[shifted(lengths[::-1], [skips[-1] - u for u in reversed(skips)])] += probability
    assert sum(law.values()) == 1
    return law


@pytest.mark.parametrize(("train_len", "target_len", "num_chunks"), [(8, 13, 2), (8, 12, 3), (7, 10, 4), (5, 5, 2)])
def test_stratified_puts_a_chunk_into_each_stratum(train_len, target_len, num_chunks):
    counts = Counter()
    for (positions_, _), count in draw_counts(Stratified(train_len, target_len, num_chunks), 40, 40_000).items():
        counts[positions_] += count
    assert_follows(counts, stratified_law(train_len, target_len, num_chunks))


def test_stratified_shows_every_distance_about_equally_often():
    """Its purpose: from the train window to the very end no distance is starved, as all are by PoSE in the end."""
    rng, sampler, seen = np.random.default_rng(0), Stratified(128, 1024), np.zeros(1024)
    for _ in range(2000):
        ids = sampler.sample(rng, 4096).position_ids
        seen[np.unique(np.abs(ids[:, None] - ids))] += 1
    assert seen[128:].min() / 2000 > 0.11 and seen[128:].max() / 2000 < 0.4


def normal_cdf(x):
    return 0.5 * (1 + erf(x / sqrt(2)))


def cream_law(L, T, document_len, sigma):
    """The law of the authors' code, with a head that leaves a middle; f = T / L need not be whole."""
    law, f = Counter(), Fraction(T, L)
    last_alpha = floor(2 * f)
    for h in (L // 3, min(floor(4 * f), L // 3)):
        m = L - 2 * h
        for alpha in range(2, last_alpha + 1):
            low = -inf if alpha == 2 else float((alpha - 1 - f) / Fraction(sigma))
            high = inf if alpha == last_alpha else float((alpha - f) / Fraction(sigma))
            p_alpha = normal_cdf(high) - normal_cdf(low)
            half = Fraction(alpha, 2)
            ends = range(floor(h + (m - 1) * half), floor(half * L) - h)
            for e in ends:
                middle = [e - m + 1 + i for i in range(m)]
                text = middle if e < document_len - h else [document_len - h - m + i for i in range(m)]
                ids = (*range(h), *middle, *range(T - h, T))
                content = (*range(h), *text, *range(document_len - h, document_len))
                law[ids, content] += 0.5 * p_alpha / len(ends)
    return law


@pytest.mark.parametrize(
    ("train_len", "target_len", "document_len", "sigma"),
    [
        (30, 60, 60, 3.0),  # heads of 10 and of 4f = 8
        (6, 24, 24, 3.0),
        (6, 24, 11, 1.5),  # the text ends before the middle does
        (6, 24, 6, 3.0),
        (7, 24, 40, 3.0),  # T is no multiple of L
        (6, 8, 8, 3.0),  # T < 2 L
        (5, 5, 7, 3.0),
        (2, 7, 9, 3.0),  # no head
        (2, 4, 4, 3.0),
    ],
)
def test_cream_draws_as_its_authors_code(train_len, target_len, document_len, sigma):
    law = cream_law(train_len, target_len, document_len, sigma)
    assert_follows(draw_counts(Cream(train_len, target_len, sigma), document_len, 8_000), law)


def sentence_law(train_len, target_len, starts):
    """Sentences that begin at 0 and at starts, in distinct slots of T - L + S; a head of r tokens keeps its ids."""
    law, num_sentences = Counter(), len(starts) + 1
    slots = list(combinations(range(target_len - train_len + num_sentences), num_sentences))
    heads = range(1, (train_len + 1) // 2 + 1)
    for chosen, r in product(slots, heads):
        skips = [slot - i if i else 0 for i, slot in enumerate(chosen)]
        sentence = [sum(start <= i for start in starts) for i in range(train_len)]
        ids = tuple(i if i < r else i + skips[sentence[i]] for i in range(train_len))
        law[ids, tuple(range(train_len))] += Fraction(1, len(slots) * len(heads))
    return law


@pytest.mark.parametrize(
    ("train_len", "target_len", "breaks", "starts"),
    [
        (6, 9, [2, 4], [2, 4]),
        (5, 8, [0, 1, 4, 5, 7, 30], [1, 4]),  # those at 0 and after the example say nothing
        (5, 7, [1, 2, 3, 4], [1, 2, 3, 4]),
        (5, 9, [], []),
        (4, 4, [2], [2]),
        (2, 3, [2], []),
    ],
)
def test_sentence_skip_gives_the_texts_sentences_distinct_slots(train_len, target_len, breaks, starts):
    law = sentence_law(train_len, target_len, starts)
    breaks = np.array(breaks, np.int64)
    assert_follows(draw_counts(SentenceSkip(train_len, target_len), 40, 8_000, breaks=breaks), law)


@pytest.mark.parametrize(("sentence_len", "train_len", "target_len"), [(2, 4, 6), (3, 4, 5), (1, 3, 6), (2, 2, 3)])
def test_sentence_skip_makes_sentences_up_where_the_text_has_none(sentence_len, train_len, target_len):
    """Each token but the first begins one with probability 1 / sentence_len."""
    law, begins = Counter(), Fraction(1, sentence_len)
    for pattern in product([False, True], repeat=train_len - 1):
        starts = [i for i, new in enumerate(pattern, 1) if new]
        p_starts = begins ** len(starts) * (1 - begins) ** (train_len - 1 - len(starts))
        for outcome, p in sentence_law(train_len, target_len, starts).items():
            if p_starts:
                law[outcome] += p * p_starts
    assert_follows(draw_counts(SentenceSkip(train_len, target_len, sentence_len), 40, 8_000), law)


@pytest.mark.parametrize(("train_len", "target_len"), [(3, 7), (2, 4), (5, 5)])
def test_single_shift_moves_all_ids_by_one_number(train_len, target_len):
    high = target_len - train_len
    text = tuple(range(train_len))
    law = {(tuple(u + i for i in text), text): Fraction(1, high + 1) for u in range(high + 1)}
    assert_follows(draw_counts(SingleShift(train_len, target_len), 12, 4_000), law)


@pytest.mark.parametrize(
    ("train_len", "target_len", "document_len", "cue_len", "positions", "content"),
    [
        (6, 20, 50, 2, [0, 1, 2, 3, 18, 19], [0, 1, 2, 3, 48, 49]),
        (6, 20, 6, 2, [0, 1, 2, 3, 18, 19], [0, 1, 2, 3, 4, 5]),
        (6, 6, 9, 5, [0, 1, 2, 3, 4, 5], [0, 4, 5, 6, 7, 8]),
        (3, 9, 4, 2, [0, 7, 8], [0, 2, 3]),
    ],
)
def test_end_anchor_ends_in_a_cue_that_weighs_less(train_len, target_len, document_len, cue_len, positions, content):
    layout = EndAnchor(train_len, target_len, cue_len, 0.25).sample(np.random.default_rng(0), document_len)
    assert layout.position_ids.tolist() == positions and layout.content_ids.tolist() == content
    assert layout.weights.tolist() == [1] * (train_len - cue_len) + [0.25] * cue_len


@pytest.mark.parametrize("cue_len", [2, 5])
def test_all_of_the_cue_but_its_first_token_is_predicted_from_afar(cue_len):
    """Of a cue of one token nothing is: the example would train as plain short text."""
    ids = EndAnchor(8, 64, cue_len).sample(np.random.default_rng(0), 50).position_ids
    predicting = ids[:-1]  # each position predicts the token after it
    assert (predicting >= 64 - cue_len).sum() == cue_len - 1


def test_of_a_mix_the_plain_examples_weigh_all_tokens_alike():
    mix, rng = Mix(6, 20, EndAnchor(6, 20, cue_len=2), plain_share=0.5), np.random.default_rng(0)
    assert mix.weighs_tokens and not Mix(6, 20, EndAnchor(6, 20, 2, cue_weight=1)).weighs_tokens
    layouts = [mix.sample(rng, 9) for _ in range(50)]
    assert {(layout.weights is None, int(layout.position_ids[-1])) for layout in layouts} == {(True, 5), (False, 19)}


@pytest.mark.parametrize("plain_share", [0, 0.25, 0.5, 1])
def test_mix_is_plain_in_its_share_of_the_examples(plain_share):
    other = pose_law(4, 7, 9, 2, "random")
    law = Counter({outcome: (1 - plain_share) * float(p) for outcome, p in other.items() if plain_share < 1})
    if plain_share > 0:
        law[(0, 1, 2, 3), (0, 1, 2, 3)] += plain_share
    assert_follows(draw_counts(Mix(4, 7, PoSE(4, 7), plain_share), 9, 8_000), law)


def test_mix_passes_sentences_on():
    mix = Mix(5, 9, SentenceSkip(5, 9), plain_share=0)
    assert mix.uses_breaks and not Mix(5, 9, PoSE(5, 9)).uses_breaks
    assert_follows(draw_counts(mix, 9, 8_000, breaks=np.array([2, 3])), sentence_law(5, 9, [2, 3]))


@pytest.mark.parametrize("sampler", [Mix(8, 32, SentenceSkip(8, 32), 0.3), Mix(8, 32, Mix(8, 32, PoSE(8, 32)))])
def test_resizing_a_mix_resizes_what_it_mixes(sampler):
    small = sampler.resized(4, 16)
    assert (small.train_len, small.target_len, small.plain_share) == (4, 16, sampler.plain_share)
    assert small.sampler == sampler.sampler.resized(4, 16)
    assert PoSE(8, 32, num_chunks=3, content="aligned").resized(4, 16) == PoSE(4, 16, 3, "aligned")


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
    train_len = draw(st.integers(2, 80))
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


SAMPLERS = {
    PoSE: lambda L, T, n: PoSE(L, T, num_chunks=n),
    Stratified: lambda L, T, n: Stratified(L, T, num_chunks=n) if n > 1 else None,
    Full: lambda L, T, n: Full(L, T),
    ShortPI: lambda L, T, n: ShortPI(L, T),
    RandPos: lambda L, T, n: RandPos(L, T),
    Released: lambda L, T, n: Released(L, T),
    EqualChunks: lambda L, T, n: EqualChunks(L, T, num_chunks=n),
    Cream: lambda L, T, n: Cream(L, T, sigma=n / 2),
    SentenceSkip: lambda L, T, n: SentenceSkip(L, T, sentence_len=n),
    SingleShift: lambda L, T, n: SingleShift(L, T),
    EndAnchor: lambda L, T, n: EndAnchor(L, T, cue_len=n, cue_weight=1 / n) if 1 < n < L else None,
    Mix: lambda L, T, n: Mix(L, T, SentenceSkip(L, T, sentence_len=n), plain_share=1 / n),
}
CONTIGUOUS_TEXT = (Full, ShortPI, RandPos, EqualChunks, SentenceSkip, SingleShift, Mix)


def test_every_sampler_is_tested():
    defined = {c for c in vars(positions).values() if isinstance(c, type) and issubclass(c, PositionSampler)}
    assert set(SAMPLERS) == defined - {PositionSampler}


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@settings(deadline=None, max_examples=60)
@given(lengths(), st.integers(1, 80), st.integers(0, 400), st.data(), seeds)
def test_what_holds_for_every_sampler(sampler_class, sizes, number, extra, data, seed):
    """Ids and text grow within their ranges, and the generator alone decides; boundary sizes are drawn too."""
    sampler = SAMPLERS[sampler_class](*sizes, min(number, sizes[0]))
    if sampler is None:
        return
    document_len = sampler.min_document_len + extra
    indices = st.lists(st.integers(0, document_len), unique=True).map(sorted)
    breaks = data.draw(st.none() | indices.map(lambda found: np.array(found, np.int64)))
    rngs = [np.random.default_rng(seed) for _ in range(2)]
    for _ in range(2):
        layout = sampler.sample(rngs[0], document_len, breaks)
        np.random.random(3)  # numpy's own state must not matter
        again = replace(sampler).sample(rngs[1], document_len, breaks)
        assert_valid(layout, sampler.example_len, sampler.target_len, document_len)
        assert np.array_equal(layout.position_ids, again.position_ids)
        assert np.array_equal(layout.content_ids, again.content_ids)
        if sampler.weighs_tokens:
            assert layout.weights.dtype == np.float32 and layout.weights.shape == (sampler.example_len,)
            assert (layout.weights > 0).all() and np.array_equal(layout.weights, again.weights)
        else:
            assert layout.weights is None
        if sampler_class in CONTIGUOUS_TEXT:
            assert layout.content_ids.tolist() == list(range(sampler.example_len))
    assert rngs[0].bit_generator.state == rngs[1].bit_generator.state


@pytest.mark.parametrize("sampler", [PoSE(4, 9, content="aligned"), *(make(4, 9, 2) for make in SAMPLERS.values())])
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
        (Released(4, 9), 4, 4),
        (EqualChunks(4, 9, num_chunks=3), 4, 4),
        (Cream(4, 9), 4, 4),
        (SentenceSkip(4, 9), 4, 4),
        (SingleShift(4, 9), 4, 4),
        (EndAnchor(4, 9, cue_len=2), 4, 4),
        (Mix(4, 9, PoSE(4, 9)), 4, 4),
        (Mix(4, 9, PoSE(4, 9, content="aligned")), 4, 9),
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


@pytest.mark.parametrize("sampler_class", [PoSE, Full, ShortPI, RandPos, Released, Cream, SentenceSkip, SingleShift])
@pytest.mark.parametrize("key", ["train_len", "target_len"])
@pytest.mark.parametrize("value", [0, 1, -4, True, 4.0, "4", None])  # of one token nothing is learnt
def test_a_length_that_is_no_integer_above_one_is_refused(sampler_class, key, value):
    with pytest.raises(ConfigError) as error:
        sampler_class(**{"train_len": 4, "target_len": 9, key: value})
    for part in (f"pose.{key}={value!r}", "integer of at least 2"):
        assert part in str(error.value)


@pytest.mark.parametrize("sampler_class", [PoSE, Full, ShortPI, RandPos, Released, Cream, SentenceSkip, SingleShift])
def test_a_target_below_the_training_length_is_refused(sampler_class):
    with pytest.raises(ConfigError) as error:
        sampler_class(9, 8)
    for part in ("pose.target_len=8", "pose.train_len=9", "at least the training length"):
        assert part in str(error.value)
    assert sampler_class(9, 9).target_len == 9


@pytest.mark.parametrize("sampler_class", [PoSE, EqualChunks])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_a_number_of_chunks_that_is_no_positive_integer_is_refused(sampler_class, value):
    with pytest.raises(ConfigError) as error:
        sampler_class(4, 9, num_chunks=value)
    for part in (f"pose.num_chunks={value!r}", "integer of at least 1"):
        assert part in str(error.value)


@pytest.mark.parametrize("sampler_class", [PoSE, EqualChunks])
def test_more_chunks_than_tokens_are_refused(sampler_class):
    with pytest.raises(ConfigError) as error:
        sampler_class(4, 9, num_chunks=5)
    for part in ("pose.num_chunks=5", "pose.train_len=4", "a chunk holds at least one token"):
        assert part in str(error.value)
    assert sampler_class(4, 9, num_chunks=4).num_chunks == 4


@pytest.mark.parametrize("value", ["Random", "", None, 0])
def test_an_unknown_content_is_refused(value):
    with pytest.raises(ConfigError) as error:
        PoSE(4, 9, content=value)
    assert f"pose.content={value!r}" in str(error.value)
    for accepted in ("random", "contiguous", "aligned"):
        assert accepted in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cream(4, 9, sigma=0), "pose.sigma=0 is not accepted: give a number above 0"),
        (lambda: Cream(4, 9, sigma=inf), "pose.sigma=inf"),
        (lambda: Cream(4, 9, sigma="3"), "pose.sigma='3'"),
        (lambda: Cream(4, 9, sigma=True), "pose.sigma=True"),
        (
            lambda: SentenceSkip(4, 9, sentence_len=0),
            "pose.sentence_len=0 is not accepted: give an integer of at least",
        ),
        (
            lambda: Mix(4, 9, PoSE(4, 9), plain_share=1.5),
            "pose.plain_share=1.5 is not accepted: give a number of at least 0 and of at most 1",
        ),
        (lambda: Mix(4, 9, PoSE(4, 9), plain_share=None), "pose.plain_share=None"),
        (lambda: EndAnchor(4, 9, cue_len=4), "pose.cue_len=4 leaves no text before the cue in pose.train_len=4"),
        (lambda: EndAnchor(4, 9, cue_len=0), "pose.cue_len=0 is not accepted: give an integer of at least 2"),
        (lambda: EndAnchor(4, 9, cue_len=1), "pose.cue_len=1 is not accepted: give an integer of at least 2"),
        (lambda: EndAnchor(4, 9, 2, cue_weight=0), "pose.cue_weight=0 is not accepted: give a number above 0"),
        (lambda: EndAnchor(4, 9, 2, cue_weight=1.5), "pose.cue_weight=1.5"),
        (
            lambda: Mix(4, 9, PoSE(4, 9, curriculum=[(0.5, 8)])),
            "pose.sampler.curriculum is not accepted: give pose.cur",
        ),
        (lambda: Mix(4, 9, "pose"), "pose.sampler='pose' is not accepted: give another choice of the group pose"),
        (lambda: Mix(4, 9, PoSE(3, 9)), "pose.sampler.train_len=3 is not pose.train_len=4"),
        (lambda: Mix(4, 9, PoSE(4, 8)), "pose.sampler.target_len=8 is not pose.target_len=9"),
        (lambda: Mix(4, 9, Full(4, 9)), "pose.sampler=Full draws examples of 9 tokens, plain ones have 4"),
    ],
)
def test_a_setting_that_cannot_work_is_named(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


# ----- a target that grows over the run -----


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_the_phases_of_a_curriculum_are_the_sampler_at_other_targets(sampler_class):
    make = SAMPLERS[sampler_class]
    sampler = replace(make(4, 16, 2), curriculum=[[0.25, 4], [0.5, 9]])
    assert sampler.curriculum == ((0.25, 4), (0.5, 9)) and hash(sampler) is not None
    if sampler_class is Full:
        with pytest.raises(
            ConfigError, match=r"pose\.curriculum has the phase \[0.25, 4\], and Full draws .*data.curr"
        ):
            assert sampler.phases
        return
    assert sampler.phases == [(0.25, make(4, 4, 2)), (0.5, make(4, 9, 2))]
    rngs = [np.random.default_rng(0) for _ in range(2)]
    for _ in range(20):  # what is left is the last target's
        a, b = sampler.sample(rngs[0], 20), make(4, 16, 2).sample(rngs[1], 20)
        assert np.array_equal(a.position_ids, b.position_ids)


def test_no_phases_are_no_curriculum():
    assert PoSE(4, 9, curriculum=[]) == PoSE(4, 9, curriculum=None) == PoSE(4, 9) and PoSE(4, 9).phases == []
    assert replace(PoSE(4, 9), curriculum=[(0.5, 5)]).resized(4, 6) == PoSE(4, 6)


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        (0.5, "pose.curriculum=0.5 is not accepted: give [[end, target], ...]"),
        ("0.5", "pose.curriculum='0.5' is not accepted"),
        ([0.5, 8], "pose.curriculum has the phase 0.5: give [end, target]"),
        ([[0.5]], "pose.curriculum has the phase [0.5]: give"),
        ([["a", 8]], "pose.curriculum has the phase ['a', 8]"),
        ([[0.5, 8.0]], "pose.curriculum has the phase [0.5, 8.0]"),
        ([[True, 8]], "pose.curriculum has the phase [True, 8]"),
        ([[0.5, 3]], "the phase [0.5, 3]: give [end, target], the end a share of the run above 0 and below 1, the "
                     "target at least 4 and at most pose.target_len=9 tokens"),
        ([[0.5, 10]], "the phase [0.5, 10]: give"),
        ([[0, 8]], "the phase [0, 8]: give"),
        ([[1, 8]], "the phase [1, 8]: give"),
        ([[0.5, 8], [0.5, 9]], "the phase [0.5, 9]: give [end, target], the end a share of the run above 0.5"),
        ([[0.2, 8], [0.5, 7]], "the phase [0.5, 7]: give [end, target], the end a share of the run above 0.2 and below "
                               "1, the target at least 8 and at"),
    ],
)  # fmt: skip
def test_a_curriculum_that_cannot_work_is_named(curriculum, message):
    with pytest.raises(ConfigError) as error:
        PoSE(4, 9, curriculum=curriculum)
    assert message in str(error.value)
