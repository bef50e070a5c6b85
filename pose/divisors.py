"""Which divisors of the rotary frequencies a search may try, and how it goes from one generation to the next.

LongRoPE2 (arXiv 2502.20082): beyond a critical dimension, itself searched, divisors never go down and lie in [s, 2s];
below it is NTK with a base that meets the first of them. Everything here is a pure function of its random generator.

Symbols as in `pose.rope`: s the factor, j = 0..d/2-1 the frequencies, theta_j / lambda_j with the divisors lambda_j.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pose.errors import ConfigError, require_int, require_number
from pose.rope import RopeGeometry, critical_dimension, real_critical_dimension

DECIMALS = 4  # of a divisor, so that a file says exactly what was tried


@dataclass(frozen=True)
class Candidate:
    """One choice of divisors.

    Attributes:
        first: j_rcd, the first frequency beyond the critical dimension.
        beyond: lambda_j for j = first..d/2-1.
    """

    first: int
    beyond: tuple[float, ...]

    def divisors(self) -> list[float]:
        """lambda_j for all j: below `first` lambda_first^(j / first), the NTK that meets it."""
        return [self.beyond[0] ** (j / self.first) for j in range(self.first)] + list(self.beyond)


@dataclass(frozen=True)
class Space:
    """All candidates for a model and a factor.

    Args:
        num: d/2, frequencies.
        factor: s.
        firsts: the least and the greatest j_rcd.
    """

    num: int
    factor: float
    firsts: tuple[int, int]

    @classmethod
    def of(cls, geometry: RopeGeometry, factor: float) -> "Space":
        """j_rcd from where the window holds fewer than ten periods to where it holds fewer than one.

        Raises:
            ConfigError: no frequency turns less than ten times in the window, so that there is nothing to search.
        """
        least, greatest = real_critical_dimension(geometry) // 2, critical_dimension(geometry) // 2
        num = geometry.dim // 2
        if least >= num:
            raise ConfigError(
                f"this model (base {geometry.base:g}, {geometry.dim} rotary dimensions, window {geometry.window}) has "
                "no frequency that turns less than ten times in its window: there is nothing to search"
            )
        return cls(num, factor, (least, min(max(least, greatest), num - 1)))

    def repaired(self, first: int, beyond: ArrayLike) -> Candidate:
        """The candidate nearest to a draft: its divisors sorted, and in [s, 2s].

        Args:
            first: j_rcd, of any size.
            beyond: divisors of all j; those below `first` are not looked at.
        """
        first = int(np.clip(first, *self.firsts))
        values = np.sort(np.asarray(beyond, float)[first:]).round(DECIMALS)  # rounded first: s = 16/3 stays s
        return Candidate(first, tuple(np.clip(values, self.factor, 2 * self.factor).tolist()))

    def seeds(self) -> list[Candidate]:
        """NTK and s from every j_rcd on: the search can only get better than those that are candidates."""
        return [self.repaired(first, [self.factor] * self.num) for first in range(self.firsts[0], self.firsts[1] + 1)]

    def drawn(self, rng: np.random.Generator) -> Candidate:
        """Any candidate."""
        first = int(rng.integers(self.firsts[0], self.firsts[1], endpoint=True))
        return self.repaired(first, rng.uniform(self.factor, 2 * self.factor, self.num))

    def mutated(self, rng: np.random.Generator, parent: Candidate, probability: float) -> Candidate:
        """Each divisor drawn anew with a probability, and j_rcd moved by up to two with the same."""
        beyond = self._padded(parent)
        is_new = rng.random(self.num) < probability
        beyond[is_new] = rng.uniform(self.factor, 2 * self.factor, int(is_new.sum()))
        first = parent.first + int(rng.integers(-2, 2, endpoint=True)) if rng.random() < probability else parent.first
        return self.repaired(first, beyond)

    def crossed(self, rng: np.random.Generator, a: Candidate, b: Candidate) -> Candidate:
        """Each divisor, and j_rcd, of one of two parents."""
        beyond = np.where(rng.random(self.num) < 0.5, self._padded(a), self._padded(b))
        return self.repaired(a.first if rng.random() < 0.5 else b.first, beyond)

    def _padded(self, candidate: Candidate) -> np.ndarray:
        return np.array([candidate.beyond[0]] * candidate.first + list(candidate.beyond))


@dataclass
class Evolution:
    """How a search goes on.

    Args:
        population: candidates of a generation.
        num_generations: after the first.
        num_parents: the best so far, from which the next generation comes.
        mutation: probability that a divisor of a child is drawn anew.

    Raises:
        ConfigError: a number out of range; names the key.
    """

    population: int = 64
    num_generations: int = 10
    num_parents: int = 16
    mutation: float = 0.3

    def __post_init__(self):
        require_int("search.population", self.population, at_least=2)
        require_int("search.num_generations", self.num_generations, at_least=0)
        require_int("search.num_parents", self.num_parents, at_least=1, at_most=self.population)
        require_number("search.mutation", self.mutation, above=0, at_most=1)

    def generation(self, space: Space, seed: int, index: int, tried: Mapping[Candidate, float]) -> list[Candidate]:
        """The candidates of a generation, none of which has been tried before it.

        Args:
            space: of the candidates.
            seed: of the search.
            index: of the generation; the first, 0, is the seeds and random ones. A population of fewer than there are
                seeds has some of them, evenly spread over j_rcd.
            tried: the fitness of all candidates of the generations before, lower is better.
        """
        rng = np.random.default_rng((seed, index))
        found: dict[Candidate, None] = {}
        if index == 0:
            seeds = space.seeds()
            places = np.linspace(0, len(seeds) - 1, min(len(seeds), self.population)).round().astype(int)
            found |= dict.fromkeys(seeds[place] for place in places)
        parents = sorted(tried, key=lambda one: (tried[one], one.first, one.beyond))[: self.num_parents]
        for _ in range(100 * self.population):  # a small space has no more
            if len(found) == self.population:
                break
            if index == 0:
                child = space.drawn(rng)
            else:
                a, b = (parents[i] for i in rng.integers(len(parents), size=2))
                child = space.mutated(rng, space.crossed(rng, a, b) if rng.random() < 0.5 else a, self.mutation)
            if child not in tried:
                found[child] = None
        return list(found)
