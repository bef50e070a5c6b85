"""What a search for divisors may try, and how generations follow from each other."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pose.divisors import Candidate, Evolution, Space
from pose.errors import ConfigError
from pose.rope import RopeGeometry

REPOSITORY = Path(__file__).parents[2]
TINY = RopeGeometry(base=500, dim=64, window=256)
LLAMA3 = RopeGeometry(base=500_000, dim=128, window=8192)


def test_spaces_by_hand():
    """j from ten periods on to one: 256 * 500^(-j/32) / 2 pi falls below 10 at j = 8, and below 1 at j = 20."""
    turns = [geometry.window * geometry.base ** (-2 * j / geometry.dim) / (2 * np.pi) for geometry, j in (
        (TINY, 7), (TINY, 8), (TINY, 19), (TINY, 20), (LLAMA3, 23), (LLAMA3, 24), (LLAMA3, 34), (LLAMA3, 35),
    )]  # fmt: skip
    assert [turn > limit for turn, limit in zip(turns, [10, 10, 1, 1] * 2, strict=True)] == [True, False] * 4
    assert Space.of(TINY, 8).firsts == (8, 20) and Space.of(LLAMA3, 16).firsts == (24, 35)
    assert Space.of(LLAMA3, 16).num == 64


def test_nothing_to_search_is_an_error():
    with pytest.raises(ConfigError, match="no frequency that turns less than ten times"):
        Space.of(RopeGeometry(base=2, dim=8, window=8192), 2)


def test_below_the_critical_dimension_is_ntk():
    """With a base whose divisors meet the first one beyond: powers of one number, from 1."""
    divisors = Candidate(4, (8.0, 9.0, 16.0)).divisors()
    np.testing.assert_allclose(divisors, [1, 8**0.25, 8**0.5, 8**0.75, 8, 9, 16])
    assert Candidate(0, (8.0, 9.0)).divisors() == [8.0, 9.0]


@given(st.integers(0, 2**32), st.sampled_from([TINY, LLAMA3]), st.floats(1.5, 64), st.floats(0.01, 1))
def test_every_candidate_is_one_of_the_space(seed, geometry, factor, mutation):
    rng, space = np.random.default_rng(seed), Space.of(geometry, factor)
    a, b = space.drawn(rng), space.drawn(rng)
    for one in (a, b, *space.seeds(), space.mutated(rng, a, mutation), space.crossed(rng, a, b)):
        assert space.firsts[0] <= one.first <= space.firsts[1] and one.first + len(one.beyond) == space.num
        beyond = np.array(one.beyond)
        assert (np.diff(beyond) >= 0).all()
        assert beyond.min() >= factor and beyond.max() <= 2 * factor
        divisors = one.divisors()
        assert len(divisors) == space.num and divisors[one.first :] == list(one.beyond)
        assert one.first == 0 or divisors[0] == 1


@pytest.mark.parametrize("file", sorted((REPOSITORY / "assets" / "factors").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_divisors_are_of_the_space_and_better_on_unseen_text(file):
    """Than the best of the search's first generation, and every closed form that was measured beside it."""
    found = yaml.safe_load(file.read_text())
    of = found["searched_for"]
    geometry = RopeGeometry(of["base"], of["dim"], of["window"])
    space, first = Space.of(geometry, found["factor"]), found["critical_dimension"] // 2
    assert found["factor"] == of["target_len"] / of["window"]
    one = space.repaired(first, found["long_factor"])
    np.testing.assert_allclose(one.divisors(), found["long_factor"], rtol=1e-12)
    heldout = {name: answers["heldout_nll"] for name, answers in found["needle_answers"].items()}
    assert min(heldout, key=heldout.__getitem__) == "searched" and len(heldout) == 7


def test_a_draft_is_brought_into_the_space():
    """Sorted, between s and 2s, rounded; j_rcd between the two critical dimensions."""
    space = Space.of(TINY, 8)
    one = space.repaired(99, [0.0] * 20 + [100, 1, 9.123456, *[12.0] * 9])
    assert one == Candidate(20, (8.0, 9.1235, *[12.0] * 9, 16.0))
    assert space.repaired(-3, [1.0] * 32) == Candidate(8, (8.0,) * 24)


def test_a_child_has_what_its_parents_have_or_what_was_drawn():
    rng, space = np.random.default_rng(0), Space.of(TINY, 8)
    a, b = (space.repaired(10, [value] * 32) for value in (9.0, 15.0))
    assert {x for _ in range(20) for x in space.crossed(rng, a, b).beyond} == {9.0, 15.0}
    few = [sum(x != 9.0 for x in space.mutated(rng, a, 0.1).beyond) for _ in range(200)]
    assert 1.5 < np.mean(few) < 3, "a tenth of 22"
    assert {space.mutated(rng, a, 1.0).first for _ in range(100)} == {8, 9, 10, 11, 12}


def run(evolution, seed, num, fitness):
    space, tried = Space.of(TINY, 8), {}
    for index in range(num):
        children = evolution.generation(space, seed, index, tried)
        assert len(children) == len(set(children)) and not set(children) & set(tried)
        tried |= {one: fitness(one) for one in children}
    return tried


def far(one: Candidate) -> float:
    """Best at j = 12 with divisors that go from s to 2s in a line."""
    wanted = np.linspace(8, 16, 32)[one.first :]
    return abs(one.first - 12) + float(np.abs(np.array(one.beyond) - wanted).mean())


def test_generations_are_deterministic_and_get_better():
    evolution = Evolution(population=32, num_parents=8)
    tried = run(evolution, 0, 8, far)
    assert run(evolution, 0, 8, far) == tried and run(evolution, 1, 8, far) != tried
    assert len(tried) == 8 * 32
    seeds = min(far(one) for one in Space.of(TINY, 8).seeds())
    at_random = min(list(tried.values())[:32])
    assert min(tried.values()) < 0.6 * min(seeds, at_random)


@pytest.mark.parametrize(("population", "firsts"), [(2, [8, 20]), (3, [8, 14, 20]), (13, list(range(8, 21)))])
def test_a_small_first_generation_has_seeds_of_the_whole_range(population, firsts):
    space = Space.of(TINY, 8)
    assert [one.first for one in space.seeds()] == list(range(8, 21))
    first = Evolution(population=population, num_parents=1).generation(space, 0, 0, {})
    assert [one.first for one in first] == firsts


def test_a_small_space_comes_to_its_end():
    space = Space(2, 8.0, (1, 1))
    tried = {space.repaired(1, [8, 8 + i * 1e-4]): 0.0 for i in range(80_001)}
    assert Evolution(population=4, num_parents=2).generation(space, 0, 1, tried) == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"population": 1}, "search.population=1"),
        ({"num_generations": -1}, "search.num_generations=-1"),
        ({"num_parents": 65}, "search.num_parents=65"),
        ({"mutation": 0}, "search.mutation=0"),
        ({"mutation": 1.5}, "search.mutation=1.5"),
    ],
)
def test_numbers_out_of_range_are_named(options, key):
    with pytest.raises(ConfigError, match=key):
        Evolution(**options)
