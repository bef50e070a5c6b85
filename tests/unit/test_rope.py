"""The scaling methods of pose/rope.py against formulas written anew, and against transformers."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose.errors import ConfigError
from pose.rope import (
    NTK,
    Cope,
    Drope,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NTKByParts,
    RopeGeometry,
    Searched,
    Theta,
    Unscaled,
    Yarn,
    YarnRevised,
    critical_dimension,
    real_critical_dimension,
)

# (base, dim, window, factor)
CASES = [
    (10_000.0, 128, 2048, 8.0),  # LLaMA
    (500_000.0, 128, 8192, 16.0),  # Llama 3
    (500.0, 64, 256, 8.0),  # the tiny model
    (500.0, 64, 128, 8.0),  # the fastest dimension turns 20 times in the window: the ramp starts at 0
    (100.0, 16, 2048, 8.0),  # the slowest turns many times: the ramp would end beyond d/2
    (10_000.0, 32, 2048, 2.0),
    (10_000.0, 128, 2048, 32.0),
    (10_000.0, 128, 2048, 64.0),
]
# every combination of these: whole heads of 64 and 128, and 16 rotary dimensions of a larger head
GRID = [
    (base, dim, window, factor)
    for base in (10_000.0, 500_000.0)
    for dim in (16, 64, 128)
    for window in (256, 2048, 8192)
    for factor in (2.0, 8.0, 32.0, 64.0)
]
SCALED = [Linear, NTK, Yarn, YarnRevised]
ALSO = [Dynamic, NTKByParts, Llama3, Theta, Drope, Cope]
SHIFTED = [partial(method, rcd_shift=True) for method in (NTK, Yarn, YarnRevised)]
BETAS = [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"beta_fast": 20, "beta_slow": 0.5, "attention_factor": 1.25}]


def resolved(method, base, dim, window, factor, **options):
    """(the method with its factor filled in from the target, the geometry)."""
    geometry = RopeGeometry(base, dim, window)
    return method(**options).resolve(geometry, int(window * factor)), geometry


# ----- the formulas, in numpy -----


def theta(base, dim):
    return np.array([base ** (-2 * j / dim) for j in range(dim // 2)])


def kept_share(base, dim, window, beta_fast, beta_slow):
    """m_j of YaRN: 1 up to the last index that turns beta_fast times, 0 from the first that turns beta_slow times.

    The line between the two runs over the index, as in YaRN's code, not over the number of turns.
    """
    turns = [window * base ** (-2 * j / dim) / (2 * math.pi) for j in range(dim)]
    low = max((j for j in range(dim) if turns[j] >= beta_fast), default=0)
    high = min((j for j in range(dim) if turns[j] <= beta_slow), default=dim - 1)
    return np.interp(np.arange(dim // 2), [low, high], [1.0, 0.0])


def expected_linear(base, dim, window, factor):
    """Rotating position m / s by theta_j is rotating position m by theta_j / s."""
    return theta(base, dim) / factor


def expected_ntk(base, dim, window, factor):
    """(b s^(d/(d-2)))^(-2j/d) = theta_j s^(-2j/(d-2))."""
    return theta(base, dim) * factor ** (-2 * np.arange(dim // 2) / (dim - 2))


def expected_yarn(base, dim, window, factor, beta_fast=32, beta_slow=1):
    """A mean of the frequencies theta_j and theta_j / s."""
    m = kept_share(base, dim, window, beta_fast, beta_slow)
    return m * theta(base, dim) + (1 - m) * theta(base, dim) / factor


def expected_yarn_revised(base, dim, window, factor, beta_fast=32, beta_slow=1):
    """A mean of the wavelengths 2 pi / theta_j and 2 pi s / theta_j."""
    m = kept_share(base, dim, window, beta_fast, beta_slow)
    wavelength = 2 * np.pi / theta(base, dim)
    return 2 * np.pi / (m * wavelength + (1 - m) * wavelength * factor)


def expected_by_turns(base, dim, window, factor, slow, fast):
    """Divided by s below `slow` turns in the window, kept above `fast`, a straight line in the turns between."""
    turns = window / (2 * np.pi / theta(base, dim))
    kept = np.interp(turns, [slow, fast], [0.0, 1.0])
    return (1 - kept) * theta(base, dim) / factor + kept * theta(base, dim)


def expected_ntk_by_parts(base, dim, window, factor):
    return expected_by_turns(base, dim, window, factor, 1, 32)


def expected_llama3(base, dim, window, factor):
    """By wavelengths, as Llama 3.1 states it: long ones over s, short ones kept, those between smoothed."""
    result = []
    for frequency in theta(base, dim):
        wavelength = 2 * math.pi / frequency
        smooth = (window / wavelength - 1) / (4 - 1)
        if wavelength > window:
            result.append(frequency / factor)
        elif wavelength < window / 4:
            result.append(frequency)
        else:
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(result)


def expected_theta(base, dim, window, factor):
    """The (fractional) dimension that turns once in the window turns once in the target, under the new base."""
    exponent = math.log(window / (2 * math.pi), base)  # base^exponent positions a radian
    new_base = (window * factor / (2 * math.pi)) ** (1 / exponent)
    return theta(new_base, dim)


def expected_drope(base, dim, window, factor):
    return theta(base, dim) * 1e-30


def expected_cope(base, dim, window, factor, num_tapered=20):
    """The lowest 20, counted from the first that is left whole to the last, of which nothing is left."""
    plain, n = theta(base, dim), min(num_tapered, dim // 2)
    share = [math.cos(math.pi * i / (2 * (n - 1))) ** 2 for i in range(n)]
    return plain * np.array([1.0] * (dim // 2 - n) + share[:-1] + [1e-30])


def expected_shifted(method, base, dim, window, factor, periods=10):
    """One frequency at a time: the first that turns less than `periods` times, and all beyond, are divided by s."""
    plain = theta(base, dim)
    first = next((j for j in range(dim // 2) if window * plain[j] / (2 * math.pi) < periods), None)
    expected = {NTK: expected_ntk, Yarn: expected_yarn, YarnRevised: expected_yarn_revised}[method]
    below = expected(base, dim, window, factor)
    if first is None:
        return below
    if method is NTK and first:  # the base under which the frequency `first` is s times slower
        below = theta((factor * base ** (2 * first / dim)) ** (dim / (2 * first)), dim)
    return np.concatenate([below[:first], plain[first:] / factor])


def expected_dynamic(base, dim, window, factor, length):
    """NTK by s n / L0 - (s - 1), past the window."""
    growth = 1.0 if length <= window else factor * length / window - factor + 1
    return expected_ntk(base, dim, window, growth)


# ----- the closed forms -----


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("method", "expected"), [(Linear, expected_linear), (NTK, expected_ntk)])
def test_linear_and_ntk_are_their_formulas(method, expected, case):
    scaling, geometry = resolved(method, *case)
    inv_freq, attention_factor = scaling.frequencies(geometry)
    assert inv_freq.dtype == torch.float64
    np.testing.assert_allclose(inv_freq.numpy(), expected(*case), rtol=1e-12)
    assert attention_factor == 1.0


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Linear, expected_linear),
        (NTK, expected_ntk),
        (NTKByParts, expected_ntk_by_parts),
        (Llama3, expected_llama3),
        (Theta, expected_theta),
        (Drope, expected_drope),
        (Cope, expected_cope),
    ],
)
def test_static_methods_are_their_formulas(method, expected):
    for case in GRID + CASES:
        scaling, geometry = resolved(method, *case)
        for length in (None, 1, case[2] + 1, 10 * case[2]):
            inv_freq, attention_factor = scaling.frequencies(geometry, length)
            assert inv_freq.dtype == torch.float64
            np.testing.assert_allclose(inv_freq.numpy(), expected(*case), rtol=1e-10)
            assert attention_factor == 1.0


@pytest.mark.parametrize("options", [{}, {"factor": 1.0}, {"factor": 3.5}])
def test_dynamic_is_the_ntk_of_its_length(options):
    for case in GRID:
        base, dim, window, factor = case
        geometry = RopeGeometry(base, dim, window)
        scaling = Dynamic(**options).resolve(geometry, int(window * factor))
        for length in (None, 1, window - 1, window, window + 1, 3 * window, int(window * factor)):
            expected = expected_dynamic(base, dim, window, options.get("factor", factor), length or 0)
            inv_freq, attention_factor = scaling.frequencies(geometry, length)
            np.testing.assert_allclose(inv_freq.numpy(), expected, rtol=1e-10)
            assert attention_factor == 1.0
            if options == {"factor": 1.0}:  # the NTK of exactly n / L0
                np.testing.assert_allclose(inv_freq, expected_ntk(base, dim, window, max(1, (length or 0) / window)))


@pytest.mark.parametrize(
    ("method", "options", "slow", "fast"),
    [
        (NTKByParts, {"beta_slow": 2.0, "beta_fast": 20}, 2, 20),
        (Llama3, {"low_freq_factor": 0.5, "high_freq_factor": 8}, 0.5, 8),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_the_ramp_by_turns_takes_its_ends(method, options, slow, fast, case):
    scaling, geometry = resolved(method, *case, **options)
    np.testing.assert_allclose(scaling.inv_freq(geometry), expected_by_turns(*case, slow, fast), rtol=1e-10)


def divisors(dim, seed):
    """Lists such as a search gives: growing, from 1."""
    return np.sort(np.random.default_rng(seed).uniform(1, 40, dim // 2)).tolist()


@pytest.mark.parametrize("case", GRID[::5])
def test_longrope_divides_by_the_list_of_its_length(case):
    base, dim, window, factor = case
    long, short = divisors(dim, 0), divisors(dim, 1)
    scaling, geometry = resolved(LongRope, *case, long_factor=long, short_factor=short)
    for length, used in ((None, short), (window, short), (window + 1, long), (window * 8, long)):
        inv_freq, attention_factor = scaling.frequencies(geometry, length)
        np.testing.assert_allclose(inv_freq, theta(base, dim) / np.array(used), rtol=1e-12)
        assert attention_factor == pytest.approx((1 + math.log(factor, window)) ** 0.5, rel=1e-12)
    scaling, geometry = resolved(LongRope, *case, long_factor=long)
    np.testing.assert_allclose(scaling.inv_freq(geometry, window), theta(base, dim), rtol=1e-12)


def test_an_empty_list_of_divisors_is_not_taken_for_none():
    with pytest.raises(ConfigError, match=r"rope\.short_factor has 0 numbers, and this model needs 64"):
        resolved(LongRope, *CASES[0], long_factor=divisors(128, 0), short_factor=[])


def test_theta_is_the_base_that_is_given():
    scaling, geometry = resolved(Theta, *CASES[0], theta=1e6)
    np.testing.assert_allclose(scaling.inv_freq(geometry), theta(1e6, 128), rtol=1e-12)
    assert scaling.to_hf(geometry) == {"rope_type": "default", "rope_theta": 1e6}


def test_thetas_default_for_llama():
    """b = 10,000, L0 = 2,048: 41 of 64 frequencies make a full turn in the window, and so at 16,384 under b'."""
    scaling, _ = resolved(Theta, *CASES[0])
    assert scaling.theta == pytest.approx(10_000 ** (math.log(16_384 / 6.283185) / math.log(2048 / 6.283185)), rel=1e-6)
    for base, length in ((10_000.0, 2048), (scaling.theta, 16_384)):
        assert (length * theta(base, 128) > 2 * math.pi).sum() == 41


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", BETAS)
@pytest.mark.parametrize(("method", "expected"), [(Yarn, expected_yarn), (YarnRevised, expected_yarn_revised)])
def test_both_yarns_are_their_formulas(method, expected, options, case):
    scaling, geometry = resolved(method, *case, **options)
    inv_freq, attention_factor = scaling.frequencies(geometry)
    betas = {key: value for key, value in options.items() if key.startswith("beta")}
    assert inv_freq.dtype == torch.float64
    np.testing.assert_allclose(inv_freq.numpy(), expected(*case, **betas), rtol=1e-12)
    assert attention_factor == pytest.approx(options.get("attention_factor", 0.1 * math.log(case[3]) + 1), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_none_leaves_the_frequencies_alone(case):
    scaling, geometry = resolved(Unscaled, *case)
    inv_freq, attention_factor = scaling.frequencies(geometry)
    np.testing.assert_allclose(inv_freq.numpy(), theta(*case[:2]), rtol=1e-12)
    assert attention_factor == 1.0


def test_yarn_at_the_size_of_the_paper_by_hand():
    """b = 10,000, d = 128, L0 = 2,048: the ramp runs from 16 to 41, so dimension 21 keeps 20 of 25 parts."""
    frequency = 10_000 ** (-42 / 128)
    for method, expected in ((Yarn, frequency * (0.8 + 0.2 / 8)), (YarnRevised, frequency / (0.8 + 0.2 * 8))):
        scaling, geometry = resolved(method, 10_000.0, 128, 2048, 8.0)
        inv_freq = scaling.frequencies(geometry).inv_freq
        assert inv_freq[21].item() == pytest.approx(expected, rel=1e-12)
        assert inv_freq[16].item() == pytest.approx(10_000 ** (-32 / 128), rel=1e-12)
        assert inv_freq[17].item() < 0.999 * 10_000 ** (-34 / 128)
        assert inv_freq[41].item() == pytest.approx(10_000 ** (-82 / 128) / 8, rel=1e-12)
        assert inv_freq[40].item() > 1.001 * 10_000 ** (-80 / 128) / 8


@pytest.mark.parametrize("case", CASES)
def test_ntk_keeps_the_fastest_and_divides_the_slowest_by_the_factor(case):
    scaling, geometry = resolved(NTK, *case)
    inv_freq = scaling.frequencies(geometry).inv_freq
    assert inv_freq[0].item() == 1.0
    assert theta(*case[:2])[-1] / inv_freq[-1].item() == pytest.approx(case[3], rel=1e-12)


@pytest.mark.parametrize("case", CASES[:3])
@pytest.mark.parametrize("method", [Yarn, YarnRevised])
def test_yarn_keeps_what_turns_often_and_interpolates_what_turns_less_than_once(method, case):
    """Section 3.2 of YaRN, by the number of turns in the window."""
    scaling, geometry = resolved(method, *case)
    plain = theta(*case[:2])
    ratio = plain / scaling.frequencies(geometry).inv_freq.numpy()
    turns = case[2] * plain / (2 * np.pi)
    assert (turns > 32).any() and (turns < 1).any()
    np.testing.assert_allclose(ratio[turns > 32], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[turns < 1], case[3], rtol=1e-12)


def released_ntk(dim, alpha, base=10_000):
    """`vanilla_ntk` of dwzhu-pku/PoSE (src/my_modeling_llama.py), in the fp32 in which it computes."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.float32(base * alpha ** (dim / (dim - 2))) ** exponents


def released_yarn_revised(dim, alpha, window, base=10_000):
    """`revised_yarn` of dwzhu-pku/PoSE (src/my_modeling_llama.py), in the fp32 in which it computes.

    The ramp runs between whole dimensions, found with beta_fast 32 and beta_slow 1; wavelengths are blended.
    """

    def correction_dim(turns):
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(correction_dim(32)), 0), min(math.ceil(correction_dim(1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    mask = np.float32(1) - ramp
    inv_freq = np.float32(1) / np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return inv_freq / ((np.float32(1) - mask) * np.float32(alpha) + mask)


@pytest.mark.parametrize("alpha", [2.0, 8.0, 32.0, 64.0])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [256, 2048, 4096])
def test_ntk_and_yarn_revised_equal_the_released_code(alpha, dim, window):
    """To 1e-6 relative; its base is always 10,000, and YaRN's attention factor 0.1 ln(alpha) + 1."""
    for method, released, attention in (
        (NTK, released_ntk(dim, alpha), 1.0),
        (YarnRevised, released_yarn_revised(dim, alpha, window), 0.1 * math.log(alpha) + 1),
    ):
        assert released.dtype == np.float32
        scaling, geometry = resolved(method, 10_000.0, dim, window, alpha)
        inv_freq, attention_factor = scaling.frequencies(geometry)
        np.testing.assert_allclose(inv_freq, released, rtol=1e-6)
        assert attention_factor == pytest.approx(attention, rel=1e-12)


def released_pose_yarn_revised(base, dim, window, alpha):
    """inv_freq / ((1 - mask) * alpha + mask), step by step and one dimension at a time."""

    def correction_dim(num_rotations):
        return dim * math.log(window / (num_rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(correction_dim(32)), 0), min(math.ceil(correction_dim(1)), dim - 1)
    result = []
    for j in range(dim // 2):
        mask = 1 - min(max((j - low) / (high - low), 0.0), 1.0)
        result.append(1.0 / base ** (2 * j / dim) / ((1 - mask) * alpha + mask))
    return np.array(result)


@pytest.mark.parametrize("case", CASES)
def test_yarn_revised_is_the_form_of_the_released_pose_code(case):
    scaling, geometry = resolved(YarnRevised, *case)
    inv_freq, attention_factor = scaling.frequencies(geometry)
    np.testing.assert_allclose(inv_freq.numpy(), released_pose_yarn_revised(*case), rtol=1e-12)
    assert attention_factor == pytest.approx(0.1 * math.log(case[3]) + 1, rel=1e-12)


def test_the_two_yarns_differ():
    """At s = 8, d = 128, b = 10,000, L0 = 2,048, 24 of 64 frequencies differ by > 1 %, one by 153 %."""
    yarn, revised = (
        scaling.frequencies(geometry).inv_freq
        for scaling, geometry in (resolved(method, *CASES[0]) for method in (Yarn, YarnRevised))
    )
    difference = yarn / revised - 1
    assert (difference.abs() > 0.01).sum().item() == 24
    assert difference.max().item() == pytest.approx(1.53, abs=0.005)


@settings(deadline=None)
@given(
    base=st.floats(100, 1e7),
    dim=st.integers(2, 128).map(lambda half: 2 * half),
    window=st.integers(256, 131_072),
    factor=st.integers(1, 128),
)
def test_every_method_stays_between_no_scaling_and_interpolation(base, dim, window, factor):
    """theta_j / s <= yarn_revised <= yarn <= theta_j, and no method changes the order of the frequencies."""
    plain = torch.from_numpy(theta(base, dim))
    results = {}
    for method in [*SCALED, *SHIFTED, NTKByParts, Llama3]:
        scaling, geometry = resolved(method, base, dim, window, factor)
        inv_freq = results[method] = scaling.frequencies(geometry).inv_freq
        assert (inv_freq <= plain * (1 + 1e-12)).all()
        assert (inv_freq >= plain / factor * (1 - 1e-12)).all()
        assert (inv_freq.diff() < 0).all()
        if factor == 1:
            torch.testing.assert_close(inv_freq, plain, rtol=1e-12, atol=0)
            assert scaling.frequencies(geometry).attention_factor == 1.0
    assert (results[YarnRevised] <= results[Yarn] * (1 + 1e-12)).all()


# ----- the critical dimension -----

LLAMA3_8B = (500_000.0, 128, 8192)
SMOLLM2 = (100_000.0, 64, 8192)
TINY = (500.0, 64, 256)


@pytest.mark.parametrize(
    ("base", "dim", "window", "theoretical", "real"),
    [
        (*LLAMA3_8B, 70, 48),  # LongRoPE2: the 35th cosine dimension
        (10_000.0, 96, 2048, 62, 38),  # Phi-3-mini; LongRoPE2: 62, the 31st
        (*SMOLLM2, 40, 28),
        (*TINY, 40, 16),
        (10_000.0, 32, 2048, 22, 14),
        (10_000.0, 128, 50, 30, 0),  # the fastest turns 8 times
        (10_000.0, 128, 6, 0, 0),  # and here less than once
        (100.0, 16, 8192, 16, 16),  # the slowest turns 23 times
    ],
)
def test_the_critical_dimensions(base, dim, window, theoretical, real):
    """By counting periods, one frequency at a time."""
    geometry = RopeGeometry(base, dim, window)
    turns = [window / (2 * math.pi * base ** (2 * j / dim)) for j in range(dim // 2)]
    assert critical_dimension(geometry) == theoretical == 2 * sum(r > 1 for r in turns)
    assert real_critical_dimension(geometry) == real == 2 * sum(r >= 10 for r in turns)
    for periods in (1, 3.5, 20):
        assert real_critical_dimension(geometry, periods) == 2 * sum(r >= periods for r in turns)


@pytest.mark.parametrize(
    ("base", "dim", "window", "first"),
    [(*LLAMA3_8B, 30), (10_000.0, 96, 2048, 25)],
)
def test_three_periods_are_where_longrope2_found_its_dimension(base, dim, window, first):
    """Its introduction: "from 31 to 25 and from 35 to 30" for Phi3-mini and LLaMA3-8B."""
    geometry = RopeGeometry(base, dim, window)
    assert Yarn(rcd_shift=True, rcd_periods=3).shifted_from(geometry) == first
    assert Yarn(rcd_periods=3).shifted_from(geometry) is None


@pytest.mark.parametrize("method", [NTK, Yarn, YarnRevised])
@pytest.mark.parametrize("periods", [10, 3])
def test_shifted_methods_divide_by_the_factor_from_the_real_critical_dimension_on(method, periods):
    for case in [*CASES, *GRID, (*LLAMA3_8B, 16.0), (*SMOLLM2, 4.0), (*TINY, 32.0), (10_000.0, 128, 50, 8.0)]:
        base, dim, _, factor = case
        scaling, geometry = resolved(method, *case, rcd_shift=True, rcd_periods=periods)
        inv_freq, attention_factor = scaling.frequencies(geometry)
        np.testing.assert_allclose(inv_freq, expected_shifted(method, *case, periods), rtol=1e-10)
        assert attention_factor == (1.0 if method is NTK else pytest.approx(0.1 * math.log(factor) + 1, rel=1e-12))
        ratio = theta(base, dim) / inv_freq.numpy()
        assert (np.diff(ratio) > -1e-9).all() and ratio[0] >= 1 - 1e-12 and ratio.max() <= factor * (1 + 1e-12)


def test_the_shift_by_hand():
    """LLaMA-3-8B, 8K to 128K: the ramp runs from 18 to 35, and j = 24 is the first that turns less than 10 times."""
    for method, last in (
        (Yarn, 1 / (12 / 17 + 5 / 17 / 16)),
        (YarnRevised, 12 / 17 + 16 * 5 / 17),
        (NTK, 16 ** (23 / 24)),
    ):
        scaling, geometry = resolved(method, *LLAMA3_8B, 16.0, rcd_shift=True)
        divisors = theta(*LLAMA3_8B[:2]) / scaling.inv_freq(geometry).numpy()
        assert divisors[23] == pytest.approx(last, rel=1e-12)
        np.testing.assert_allclose(divisors[24:], 16.0, rtol=1e-12)


def test_a_ramp_that_ends_at_ten_turns_is_shifted_already():
    for case in (*LLAMA3_8B, 16.0), (*SMOLLM2, 4.0), (*TINY, 8.0):
        shifted, geometry = resolved(Yarn, *case, beta_slow=10.0, rcd_shift=True)
        torch.testing.assert_close(
            shifted.inv_freq(geometry), resolved(Yarn, *case, beta_slow=10.0)[0].inv_freq(geometry)
        )


@pytest.mark.parametrize("method", [NTK, Yarn, YarnRevised])
def test_shifts_at_the_borders(method):
    # every frequency turns less than 10 times: all are divided
    scaling, geometry = resolved(method, 10_000.0, 128, 50, 8.0, rcd_shift=True)
    np.testing.assert_allclose(scaling.inv_freq(geometry), theta(10_000.0, 128) / 8, rtol=1e-12)
    assert scaling.to_hf(geometry)["long_factor"] == pytest.approx([8.0] * 64)
    # none does: the method as it is, in its own words
    (scaling, geometry), (own, _) = (
        resolved(method, 100.0, 16, 8192, 8.0, rcd_shift=shift, attention_factor=1.0) for shift in (True, False)
    )
    assert torch.equal(scaling.inv_freq(geometry), own.inv_freq(geometry))
    assert scaling.to_hf(geometry) == own.to_hf(geometry)
    # a factor that is given is the one that counts, and 1 changes nothing
    geometry = RopeGeometry(*TINY)
    scaling = method(rcd_shift=True, factor=4).resolve(geometry, 2048)
    np.testing.assert_allclose(scaling.inv_freq(geometry), expected_shifted(method, *TINY, 4), rtol=1e-12)
    same = method(rcd_shift=True).resolve(geometry, 256)
    np.testing.assert_allclose(same.inv_freq(geometry), theta(*TINY[:2]), rtol=1e-12)


# ----- CoPE -----


def released_cope(inv_freq, clip_low_n=20):
    """The taper of hrlics/CoPE (modeling_cope.py), in the fp32 in which it computes."""
    clip = min(clip_low_n, len(inv_freq))
    taper = 0.5 * (1 + np.cos(np.linspace(0, np.pi, clip, dtype=np.float32)))
    return np.concatenate([inv_freq[: len(inv_freq) - clip], inv_freq[len(inv_freq) - clip :] * taper])


@pytest.mark.parametrize(("base", "dim"), [(500_000.0, 128), (500.0, 64), (10_000.0, 32)])
@pytest.mark.parametrize("options", [{}, {"theta": 1e7}, {"num_tapered": 7}])
def test_cope_is_the_released_taper(base, dim, options):
    scaling, geometry = resolved(Cope, base, dim, 8192, 8.0, **options)
    inv_freq, attention_factor = scaling.frequencies(geometry)
    wanted = released_cope(theta(options.get("theta", base), dim), options.get("num_tapered", 20))
    np.testing.assert_allclose(inv_freq, wanted, rtol=1e-5, atol=1e-29)
    assert wanted[-1] < 1e-12 and inv_freq[-1] == pytest.approx(base ** (2 / dim - 1) * 1e-30, rel=1e-12, abs=0)
    assert attention_factor == 1.0


@pytest.mark.parametrize("base", [729.0, 2320.0, 500_000.0])
def test_cope_divides_by_no_more_than_what_a_config_may_hold(base):
    """At most 1e30 is read (checkpoints/checks.py); for the first two bases theta / (theta / 1e30) is a bit more."""
    for theta in (None, 1e9):
        scaling, geometry = resolved(Cope, base, 64, 8192, 8.0, theta=theta)
        divisors = scaling.to_hf(geometry)["long_factor"]
        assert divisors[-1] == max(divisors) == pytest.approx(1e30) and max(divisors) <= 1e30


# ----- transformers -----


def llama_config(rope_parameters, dim, target_len):
    return LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=target_len,
        rope_parameters=rope_parameters,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("method", "rope_type"),
    [(Unscaled, "default"), (Linear, "linear"), (NTK, "default"), (Yarn, "yarn"), (YarnRevised, "longrope")],
)
def test_transformers_builds_the_same_frequencies(method, rope_type, case):
    """Within the rounding of fp32, in which transformers computes the powers of the base."""
    _, dim, window, factor = case
    scaling, geometry = resolved(method, *case)
    config = llama_config(scaling.to_hf(geometry), dim, int(window * factor))
    assert config.rope_parameters["rope_type"] == rope_type
    init = ROPE_INIT_FUNCTIONS.get(rope_type, LlamaRotaryEmbedding.compute_default_rope_parameters)
    inv_freq, attention_factor = init(config)
    expected = scaling.frequencies(geometry)
    torch.testing.assert_close(inv_freq.double(), expected.inv_freq, rtol=3e-6, atol=0)
    assert attention_factor == pytest.approx(expected.attention_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "rope_type"),
    [
        (Linear, "linear"),
        (Yarn, "yarn"),
        (Llama3, "llama3"),
        (NTKByParts, "llama3"),
        (YarnRevised, "longrope"),
        (Drope, "llama3"),
        (NTK, "default"),
        (Theta, "default"),
        (Cope, "longrope"),
        (partial(Cope, theta=1e7, num_tapered=5), "longrope"),
        *((method, "longrope") for method in SHIFTED),
    ],
)
@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_transformers_builds_every_static_method_with_any_attention_factor(method, rope_type, attention_factor):
    """A type that has no place for the attention factor gives way to divisors; partial rotary is taken along."""
    for case in GRID:
        _, dim, window, factor = case
        scaling, geometry = resolved(method, *case, attention_factor=attention_factor)
        hf = scaling.to_hf(geometry)
        if attention_factor is not None and rope_type != "yarn":
            rope_type = "longrope"
        if rope_type == "longrope":
            assert hf["short_factor"] == hf["long_factor"] and len(hf["short_factor"]) == dim // 2
            assert (hf["factor"], hf["original_max_position_embeddings"]) == (factor, window)
            assert json.loads(json.dumps(hf)) == hf
        # the rotary dimensions are the half of a head
        config = GPTNeoXConfig(
            hidden_size=2 * dim,
            num_attention_heads=1,
            max_position_embeddings=int(window * factor),
            rope_parameters=hf | {"partial_rotary_factor": 0.5},
        )
        assert config.rope_parameters["rope_type"] == rope_type
        init = ROPE_INIT_FUNCTIONS.get(rope_type, GPTNeoXRotaryEmbedding.compute_default_rope_parameters)
        expected = scaling.frequencies(geometry)
        for length in (None, window, window + 1):
            inv_freq, built_factor = init(config, "cpu", seq_len=length)
            torch.testing.assert_close(inv_freq.double(), expected.inv_freq, rtol=3e-6, atol=0)
            assert built_factor == pytest.approx(expected.attention_factor, rel=1e-12)


def test_transformers_builds_the_same_dynamic_frequencies_at_any_length():
    """Its window is max_position_embeddings, which must not be the target."""
    for case in GRID:
        _, dim, window, factor = case
        scaling, geometry = resolved(Dynamic, *case)
        config = llama_config(scaling.to_hf(geometry), dim, window)
        assert config.rope_parameters["rope_type"] == "dynamic"
        for length in (1, window, window + 1, 3 * window, int(window * factor), 2 * int(window * factor)):
            inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
            torch.testing.assert_close(inv_freq.double(), scaling.inv_freq(geometry, length), rtol=3e-6, atol=0)
            assert attention_factor == scaling.attention_factor == 1.0


@pytest.mark.parametrize("case", GRID[::3])
@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_transformers_builds_longrope_and_its_own_attention_factor(case, attention_factor):
    _, dim, window, factor = case
    scaling, geometry = resolved(
        LongRope,
        *case,
        long_factor=divisors(dim, 0),
        short_factor=divisors(dim, 1),
        attention_factor=attention_factor,
    )
    hf = scaling.to_hf(geometry)
    if attention_factor is None:
        del hf["attention_factor"]  # what transformers makes of the factor
    config = llama_config(hf, dim, int(window * factor))
    for length in (None, window, window + 1, int(window * factor)):
        inv_freq, built_factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
        torch.testing.assert_close(inv_freq.double(), scaling.inv_freq(geometry, length), rtol=3e-6, atol=0)
        assert built_factor == pytest.approx(scaling.attention_factor, rel=1e-12)


@pytest.mark.parametrize("options", BETAS[1:])
@pytest.mark.parametrize("method", [Yarn, YarnRevised])
def test_transformers_reads_the_options_of_yarn(method, options):
    scaling, geometry = resolved(method, *CASES[0], **options)
    config = llama_config(scaling.to_hf(geometry), 128, 16_384)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    expected = scaling.frequencies(geometry)
    torch.testing.assert_close(inv_freq.double(), expected.inv_freq, rtol=3e-6, atol=0)
    assert attention_factor == pytest.approx(expected.attention_factor, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_defaults_of_yarn_are_those_of_transformers(case):
    """A config that names the factor and the window alone means the same to both."""
    base, dim, window, factor = case
    bare = {"rope_type": "yarn", "rope_theta": base, "factor": factor, "original_max_position_embeddings": window}
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](llama_config(bare, dim, int(window * factor)))
    scaling, geometry = resolved(Yarn, *case)
    expected = scaling.frequencies(geometry)
    torch.testing.assert_close(inv_freq.double(), expected.inv_freq, rtol=3e-6, atol=0)
    assert attention_factor == pytest.approx(expected.attention_factor, rel=1e-12)


@pytest.mark.parametrize("method", [Unscaled, *SCALED, *SHIFTED, NTKByParts, Llama3, Theta, Drope, Cope])
def test_transformers_rotates_alike_at_any_length(method):
    """Static: cos and sin are those of the closed form for short inputs, past the window, and short again."""
    scaling, geometry = resolved(method, *CASES[0])
    rotary = LlamaRotaryEmbedding(llama_config(scaling.to_hf(geometry), 128, 16_384))
    inv_freq, attention_factor = scaling.frequencies(geometry)
    for last in (40, 16_383, 40):
        positions = torch.tensor([[0, 1, 7, last]])
        angles = (positions[0, :, None].double() * inv_freq).repeat(1, 2)
        cos, sin = rotary(torch.zeros(1), positions)
        # position 16,383 times a relative error of 3e-6 is 0.05 rad
        torch.testing.assert_close(cos[0].double(), angles.cos() * attention_factor, rtol=0, atol=3e-6 * last + 1e-6)
        torch.testing.assert_close(sin[0].double(), angles.sin() * attention_factor, rtol=0, atol=3e-6 * last + 1e-6)


# ----- resolve -----


def test_the_factor_is_target_over_window_unless_given():
    geometry = RopeGeometry(10_000.0, 128, 2048)
    for method in [*SCALED, *ALSO]:
        assert method().resolve(geometry, 16_384).factor == 8.0
        assert method().resolve(geometry, 3072).factor == 1.5
        assert method(factor=4).resolve(geometry, 16_384).factor == 4


@pytest.mark.parametrize("method", [Yarn, YarnRevised])
def test_the_attention_factor_follows_the_factor_in_use(method):
    geometry = RopeGeometry(10_000.0, 128, 2048)
    scaling = method(factor=4).resolve(geometry, 16_384)
    assert scaling.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert method(factor=4, attention_factor=0.9).resolve(geometry, 16_384).attention_factor == 0.9


@pytest.mark.parametrize("method", [Unscaled, *SCALED, *ALSO])
def test_resolving_leaves_the_original_alone_and_a_second_time_changes_nothing(method):
    scaling = method()
    geometry = RopeGeometry(10_000.0, 128, 2048)
    first = scaling.resolve(geometry, 16_384)
    assert scaling == method()
    assert type(first) is method
    assert first.resolve(geometry, 16_384) == first


def test_names_are_those_of_the_config_group():
    lists = [method(long_factor=[1]) for method in (LongRope, Searched)]
    names = {method.name for method in [Unscaled(), *(method() for method in [*SCALED, *ALSO]), *lists]}
    with_numbers_of_a_model = {"yarn_smollm2", "searched_smollm2"}
    choices = {file.stem for file in (Path(__file__).parents[2] / "conf" / "rope").iterdir()}
    assert names == choices - with_numbers_of_a_model


# ----- errors -----


@pytest.mark.parametrize("method", [*SCALED, *ALSO])
@pytest.mark.parametrize("value", [0.5, 0, -8, float("nan"), float("inf"), "8", True])
def test_a_factor_that_is_no_number_of_at_least_1_is_refused(method, value):
    with pytest.raises(ConfigError) as error:
        method(factor=value)
    for part in (f"rope.factor={value!r}", "a number of at least 1 or null"):
        assert part in str(error.value)
    assert method(factor=1).factor == 1


@pytest.mark.parametrize("method", [Yarn, YarnRevised])
@pytest.mark.parametrize(
    ("options", "key", "value", "accepted"),
    [
        ({"beta_fast": 1.0}, "beta_fast", 1.0, "above 1"),
        ({"beta_fast": 2, "beta_slow": 4}, "beta_fast", 2, "above 4"),
        ({"beta_fast": "32"}, "beta_fast", "32", "above 1"),
        ({"beta_fast": None}, "beta_fast", None, "above 1"),
        ({"beta_slow": 0.0}, "beta_slow", 0.0, "above 0"),
        ({"beta_slow": float("nan")}, "beta_slow", float("nan"), "above 0"),
        ({"attention_factor": 0}, "attention_factor", 0, "above 0 or null"),
        ({"attention_factor": -1.0}, "attention_factor", -1.0, "above 0 or null"),
        ({"attention_factor": True}, "attention_factor", True, "above 0 or null"),
    ],
)
def test_options_of_yarn_out_of_range_are_refused(method, options, key, value, accepted):
    with pytest.raises(ConfigError) as error:
        method(**options)
    for part in (f"rope.{key}={value!r}", f"a number {accepted}"):
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["factor", "attention_factor"])
@pytest.mark.parametrize("value", [1.0, 8, "8"])
def test_none_refuses_a_factor(key, value):
    with pytest.raises(ConfigError) as error:
        Unscaled(**{key: value})
    for part in (f"rope.{key}={value!r}", "rope=none", "null"):
        assert part in str(error.value)


@pytest.mark.parametrize("method", [*SCALED, *ALSO])
@pytest.mark.parametrize("value", [0, -1.0, True, "2", float("nan")])
def test_an_attention_factor_that_is_not_above_0_is_refused(method, value):
    with pytest.raises(ConfigError, match=r"rope\.attention_factor=.* a number above 0 or null"):
        method(attention_factor=value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (NTKByParts, {"beta_fast": 1.0}, "rope.beta_fast=1.0 is not accepted: give a number above 1"),
        (NTKByParts, {"beta_slow": 0}, "rope.beta_slow=0 is not accepted: give a number above 0"),
        (Llama3, {"low_freq_factor": -1}, "rope.low_freq_factor=-1 is not accepted: give a number above 0"),
        (Llama3, {"low_freq_factor": 5}, "rope.high_freq_factor=4.0 is not accepted: give a number above 5"),
        (Theta, {"theta": 1.0}, "rope.theta=1.0 is not accepted: give a number above 1 or null"),
        (Cope, {"theta": 1.0}, "rope.theta=1.0 is not accepted: give a number above 1 or null"),
        (Cope, {"num_tapered": 1}, "rope.num_tapered=1 is not accepted: give an integer of at least 2"),
        (Cope, {"num_tapered": 2.5}, "rope.num_tapered=2.5 is not accepted: give an integer of at least 2"),
        (Yarn, {"rcd_shift": "yes"}, "rope.rcd_shift='yes' is not accepted: give true or false"),
        (YarnRevised, {"rcd_shift": 1}, "rope.rcd_shift=1 is not accepted: give true or false"),
        (NTK, {"rcd_periods": 0}, "rope.rcd_periods=0 is not accepted: give a number above 0"),
        (LongRope, {}, "rope.long_factor is not set"),
        (LongRope, {"long_factor": 8}, "rope.long_factor=8 is not accepted: give a list of numbers"),
        (LongRope, {"long_factor": "12"}, "rope.long_factor='12' is not accepted: give a list of numbers"),
        (LongRope, {"long_factor": [1, 0]}, "rope.long_factor[1]=0 is not accepted: give a number above 0"),
        (LongRope, {"long_factor": [1], "short_factor": ["a"]}, "rope.short_factor[0]='a' is not accepted"),
    ],
)
def test_other_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(ConfigError) as error:
        method(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["long_factor", "short_factor"])
def test_a_list_of_another_length_is_refused(key):
    lists = {"long_factor": [1.0] * 64, key: [1.0] * 32}
    with pytest.raises(ConfigError) as error:
        LongRope(**lists).resolve(RopeGeometry(10_000.0, 128, 2048), 16_384)
    for part in (f"rope.{key} has 32 numbers", "needs 64", "128 rotary dimensions"):
        assert part in str(error.value)


@pytest.mark.parametrize("method", [NTK, Dynamic])
def test_ntk_on_two_rotary_dimensions_is_refused(method):
    with pytest.raises(ConfigError, match=rf"rope={method().name} needs at least 4 rotary dimensions .* has 2"):
        method().resolve(RopeGeometry(10_000.0, 2, 2048), 16_384)
    scaling = method().resolve(RopeGeometry(10_000.0, 4, 2048), 16_384)
    assert scaling.inv_freq(RopeGeometry(10_000.0, 4, 2048)).isfinite().all()


def test_what_plain_transformers_has_no_place_for_is_refused():
    geometry = RopeGeometry(10_000.0, 128, 2048)
    with pytest.raises(ConfigError, match=r"rope\.attention_factor=1\.2 is not accepted by rope=dynamic"):
        Dynamic(attention_factor=1.2).resolve(geometry, 16_384)
    with pytest.raises(ConfigError, match=r"'dynamic'.* choose a static method"):
        Dynamic().resolve(geometry, 16_384).to_longrope(geometry)


def test_a_window_too_short_for_thetas_default_is_refused():
    with pytest.raises(ConfigError, match=r"rope\.theta is not set, and its default needs a window above 6"):
        Theta().resolve(RopeGeometry(10_000.0, 128, 6), 16)
    assert Theta(theta=20_000).resolve(RopeGeometry(10_000.0, 128, 6), 16).theta == 20_000


@pytest.mark.parametrize("method", [*SCALED, *ALSO])
@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_a_scaled_checkpoint_is_not_scaled_again(method, rope_type):
    geometry = RopeGeometry(10_000.0, 128, 2048, rope_type)
    for scaling in (method(), method(factor=8)):
        with pytest.raises(ConfigError) as error:
            scaling.resolve(geometry, 16_384)
        for part in (f"rope={scaling.name} ", repr(rope_type), "rope=none"):
            assert part in str(error.value)
    assert scaling.resolve(replace(geometry, rope_type="default"), 16_384).factor == 8


def test_none_takes_a_scaled_checkpoint_but_claims_no_closed_form_for_it():
    geometry = RopeGeometry(10_000.0, 128, 2048, "yarn")
    scaling = Unscaled().resolve(geometry, 16_384)
    assert scaling == Unscaled()
    with pytest.raises(ValueError, match="'yarn'"):
        scaling.frequencies(geometry)
