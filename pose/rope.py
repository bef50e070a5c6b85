"""How a model's rotary frequencies change when its window is extended.

One frozen dataclass per method. Each gives its frequencies in closed form (`inv_freq`), and the
base class the form in which plain transformers builds the same ones (`to_hf`), so that a trained
model *is* a plain Hugging Face model and its export cannot differ.

Symbols: d the rotary dimensions of a head, b the base (rope_theta), L0 the model's own window,
s the factor, n the tokens of a text, theta_j = b^(-2j/d) for j in 0..d/2-1.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch

from pose.errors import ConfigError, require_int, require_number

T = TypeVar("T")
DROPPED = 1e30  # the divisor of a frequency that is to be none


@dataclass(frozen=True)
class RopeGeometry:
    """What a model's config says of its rotary embedding.

    Args:
        base: b, rope_theta.
        dim: d, rotary dimensions of one head; fewer than the head has where rotary is partial.
        window: L0, the context the model was pretrained for, in tokens.
        rope_type: how the checkpoint is scaled already; "default" for a plain one.
    """

    base: float
    dim: int
    window: int
    rope_type: str = "default"

    def theta(self) -> torch.Tensor:
        """theta_j = b^(-2j/d), unscaled; float64 [d/2], in radians per position."""
        return self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)

    def turns(self) -> torch.Tensor:
        """r_j = L0 theta_j / (2 pi): how often each frequency turns in the window; float64 [d/2]."""
        return self.window * self.theta() / (2 * math.pi)


class Frequencies(NamedTuple):
    """A method's result.

    Attributes:
        inv_freq: float64 [d/2], radians per position. Models hold it in float32.
        attention_factor: multiplies cos and sin, so attention logits grow by its square (where
            rotary is partial: the share of the logits that comes from the rotary dimensions).
    """

    inv_freq: torch.Tensor
    attention_factor: float


@dataclass(frozen=True)
class RopeScaling(ABC):
    """What every method has in common.

    A new method needs `inv_freq` alone; `native` where transformers has a type for it, and
    `own_attention_factor` where the method has one.

    Args:
        factor: s, how many times the window grows; None means target_len / window, worked out by
            `resolve` once the model is known.
        attention_factor: multiplies cos and sin; None means the method's own.

    Raises:
        ConfigError: factor is given and is not a number of at least 1, or attention_factor is not above 0.
    """

    factor: float | None = None
    attention_factor: float | None = None

    def __post_init__(self):
        require_number("rope.factor", self.factor, at_least=1.0, optional=True)
        require_number("rope.attention_factor", self.attention_factor, above=0.0, optional=True)

    @property
    def name(self) -> str:
        """The method's name in the config group `rope`."""
        return re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the text."""
        return False

    def resolve(self, geometry: RopeGeometry, target_len: int) -> Self:
        """The same method with everything filled in that follows from the model and the target.

        Args:
            geometry: of the model to extend.
            target_len: in tokens.

        Raises:
            ConfigError: the model is scaled already, so its base and window are no longer its own;
                or the method cannot be applied to its dimensions.
        """
        if geometry.rope_type != "default":
            raise ConfigError(
                f"rope={self.name} cannot be laid over a checkpoint whose RoPE is already scaled "
                f"(rope_type {geometry.rope_type!r}): start from the unscaled model, or keep its "
                "frequencies with rope=none"
            )
        scaling = replace(self, factor=self.factor or target_len / geometry.window)
        attention_factor = self.attention_factor or scaling.own_attention_factor(geometry)
        return replace(scaling, attention_factor=float(attention_factor))

    def own_attention_factor(self, geometry: RopeGeometry) -> float:
        """The attention factor that belongs to the method."""
        return 1.0

    @abstractmethod
    def inv_freq(self, geometry: RopeGeometry, seq_len: int | None = None) -> torch.Tensor:
        """The closed form; float64 [d/2], in radians per position.

        Args:
            geometry: of the model to extend.
            seq_len: n, for methods whose frequencies depend on the length of the text; None means
                no more than the window. The others do not look at it.
        """

    def frequencies(self, geometry: RopeGeometry, seq_len: int | None = None) -> Frequencies:
        """`inv_freq` with the attention factor. Call `resolve` first: it fills in both factors."""
        return Frequencies(self.inv_freq(geometry, seq_len), _known(self.attention_factor))

    def to_hf(self, geometry: RopeGeometry) -> dict[str, Any]:
        """transformers' `rope_parameters` that build exactly `frequencies`.

        The method's own type where transformers has one that can say everything, else `to_longrope`.
        """
        native = self.native(geometry)
        if native is None or ("attention_factor" not in native and self.attention_factor != 1.0):
            return self.to_longrope(geometry)
        return native

    def native(self, geometry: RopeGeometry) -> dict[str, Any] | None:
        """transformers' own type for the method; None where it has none."""
        return None

    def to_longrope(self, geometry: RopeGeometry) -> dict[str, Any]:
        """Any static method as transformers' `longrope`: the divisor theta_j / inv_freq_j of each dimension."""
        divisors = (geometry.theta() / self.inv_freq(geometry)).clamp(max=DROPPED).tolist()
        return self._longrope(geometry, divisors, divisors)

    def _longrope(self, geometry: RopeGeometry, short: Sequence[float], long: Sequence[float]) -> dict[str, Any]:
        return {
            "rope_type": "longrope",
            "rope_theta": geometry.base,
            "factor": self.factor,
            "original_max_position_embeddings": geometry.window,
            "short_factor": list(short),
            "long_factor": list(long),
            "attention_factor": self.attention_factor,
        }


@dataclass(frozen=True)
class Unscaled(RopeScaling):
    """`rope=none`: the checkpoint's frequencies as they are, whatever they are."""

    def __post_init__(self):
        for key in ("factor", "attention_factor"):
            value = getattr(self, key)
            if value is not None:
                raise ConfigError(f"rope.{key}={value!r} means nothing for rope=none: leave it null")

    @property
    def name(self) -> str:
        return "none"

    def resolve(self, geometry, target_len):
        return self

    def inv_freq(self, geometry, seq_len=None):
        if geometry.rope_type != "default":
            raise ValueError(f"no closed form here for a checkpoint of rope_type {geometry.rope_type!r}")
        return geometry.theta()

    def frequencies(self, geometry, seq_len=None):
        return Frequencies(self.inv_freq(geometry), 1.0)

    def to_hf(self, geometry):
        return {"rope_type": "default", "rope_theta": geometry.base}


@dataclass(frozen=True)
class Linear(RopeScaling):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): m -> m/s, so theta_j / s."""

    def inv_freq(self, geometry, seq_len=None):
        return geometry.theta() / _known(self.factor)

    def native(self, geometry):
        return {"rope_type": "linear", "rope_theta": geometry.base, "factor": self.factor}


@dataclass(frozen=True)
class _Shifted(RopeScaling):
    """A method that can be told to interpolate, from the real critical dimension on, at least by s.

    LongRoPE2 (arXiv 2502.20082) calls the two methods so shifted YaRN-rcd and NTK-rcd. Its own d_rcd is what a search
    found, j = 30 and 25 for LLaMA-3-8B and Phi-3-mini. Where the search begins, at 10 periods, is j = 24 and 19, which
    is the default here; `rcd_periods` = 3 gives exactly the two that were found. Where every frequency turns so often
    in the window there is nothing to shift, and the method stays as it is.

    Args:
        rcd_shift: whether frequencies that turn less than rcd_periods times in the window are divided by at least s.
        rcd_periods: turns in the window below which a frequency counts as not well trained.

    Raises:
        ConfigError: rcd_shift is neither true nor false, or rcd_periods is not above 0.
    """

    rcd_shift: bool = False
    rcd_periods: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.rcd_shift, bool):
            raise ConfigError(f"rope.rcd_shift={self.rcd_shift!r} is not accepted: give true or false")
        require_number("rope.rcd_periods", self.rcd_periods, above=0.0)

    def shifted_from(self, geometry: RopeGeometry) -> int | None:
        """j_rcd, the first frequency that is shifted; None where none is."""
        if not self.rcd_shift:
            return None
        first = real_critical_dimension(geometry, self.rcd_periods) // 2
        return first if first < geometry.dim // 2 else None


@dataclass(frozen=True)
class NTK(_Shifted):
    """Static NTK-aware scaling: plain RoPE with the base b' = b * s^(d/(d-2)).

    The fastest frequency stays, the slowest is divided by exactly s. Being a changed base and
    nothing else, it is exported as `rope_theta`.

    With `rcd_shift` the base is b * s^(d/(2 j_rcd)), so that a divisor s^(j/j_rcd) reaches s at the real critical
    dimension already, and the divisor is s from there on, which no base can say. (The NTK that LongRoPE2 compares with
    is another: its base is the default of `Theta`. What its NTK-rcd divides by beyond d_rcd it does not say; the same s
    for all is how its search begins.)
    """

    def resolve(self, geometry, target_len):
        _require_ntk_dim(self.name, geometry)
        return super().resolve(geometry, target_len)

    def scaled_base(self, geometry: RopeGeometry) -> float:
        """b' = b * s^(d/(d-2))."""
        return geometry.base * _known(self.factor) ** (geometry.dim / (geometry.dim - 2))

    def inv_freq(self, geometry, seq_len=None):
        first = self.shifted_from(geometry)
        if first is None:
            return replace(geometry, base=self.scaled_base(geometry)).theta()
        j = torch.arange(geometry.dim // 2, dtype=torch.float64)
        reached = (j / first).clamp(max=1) if first else torch.ones_like(j)
        return geometry.theta() / _known(self.factor) ** reached

    def native(self, geometry):
        if self.shifted_from(geometry) is not None:
            return None
        return {"rope_type": "default", "rope_theta": self.scaled_base(geometry)}


@dataclass(frozen=True)
class Dynamic(RopeScaling):
    """Dynamic NTK, as transformers' type `dynamic`: the base grows with the length n of the text.

    b_n = b * (s n / L0 - (s - 1))^(d/(d-2)) for n > L0, b_n = b up to the window. With s = 1 that is
    the NTK of exactly n / L0; a larger s stretches more, and s^2 - s + 1 times at n = s L0.

    transformers takes L0 from `max_position_embeddings`, which therefore stays the model's own
    window; the target is noted beside it (`pose.modeling.rotary.target_len_of`).
    """

    @property
    def depends_on_length(self):
        return True

    def resolve(self, geometry, target_len):
        _require_ntk_dim(self.name, geometry)
        if self.attention_factor not in (None, 1.0):
            raise ConfigError(
                f"rope.attention_factor={self.attention_factor!r} is not accepted by rope=dynamic: plain transformers "
                "has no place for it, so the exported model would not be the trained one; leave it null"
            )
        return super().resolve(geometry, target_len)

    def inv_freq(self, geometry, seq_len=None):
        n, s = max(seq_len or 0, geometry.window), _known(self.factor)
        growth = s * n / geometry.window - (s - 1)
        base = geometry.base * growth ** (geometry.dim / (geometry.dim - 2))
        return replace(geometry, base=base).theta()

    def native(self, geometry):
        return {"rope_type": "dynamic", "rope_theta": geometry.base, "factor": self.factor}

    def to_longrope(self, geometry):
        raise ConfigError(
            "rope=dynamic cannot be written for this model: its class does not know the type 'dynamic', and no list "
            "of divisors can say frequencies that depend on the length; choose a static method"
        )


@dataclass(frozen=True)
class NTKByParts(RopeScaling):
    """NTK-by-parts (YaRN, arXiv 2309.00071, section 3.2): YaRN without its attention factor, by turns.

    With r_j = L0 theta_j / (2 pi) the turns of a dimension in the window and gamma_j the ramp from
    0 at r = beta_slow to 1 at r = beta_fast, linear in r:  theta_j * (gamma_j + (1 - gamma_j) / s).
    (YaRN's code, and so `Yarn`, runs its ramp over j instead.)

    Args:
        beta_fast: turns in the window above which a dimension is left alone (the paper's beta).
        beta_slow: turns in the window below which a dimension is fully interpolated (alpha).

    Raises:
        ConfigError: a beta is not positive, or beta_fast <= beta_slow.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_number("rope.beta_slow", self.beta_slow, above=0.0)
        require_number("rope.beta_fast", self.beta_fast, above=self.beta_slow)

    def inv_freq(self, geometry, seq_len=None):
        return _interpolate_by_turns(geometry, _known(self.factor), self.beta_slow, self.beta_fast)

    def native(self, geometry):
        return _llama3(geometry, _known(self.factor), self.beta_slow, self.beta_fast)


@dataclass(frozen=True)
class Yarn(_Shifted):
    """YaRN (Peng et al. 2023, arXiv 2309.00071) as transformers and vLLM read it.

    Dimensions that turn more than `beta_fast` times in the window keep their frequency, those
    that turn less than `beta_slow` times are divided by s, and *frequencies* are blended linearly
    in between:  theta_j * (m_j + (1 - m_j) / s), m_j the ramp from 1 (fast) to 0 (slow).
    Its own attention factor is 0.1 ln(s) + 1.

    With `rcd_shift` the divisor is max(YaRN's own, s) from the real critical dimension on, which is s: the ramp breaks
    off there. The attention factor stays. (`beta_slow` = `rcd_periods` is the other way to read YaRN-rcd, of which
    LongRoPE2 says no more than "applying d_rcd to YaRN": the ramp ends at the same dimension, without a jump.)

    Args:
        beta_fast: turns in the window above which a dimension is left alone.
        beta_slow: turns in the window below which a dimension is fully interpolated.

    Raises:
        ConfigError: a beta is not positive, or beta_fast <= beta_slow.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_number("rope.beta_slow", self.beta_slow, above=0.0)
        require_number("rope.beta_fast", self.beta_fast, above=self.beta_slow)

    def own_attention_factor(self, geometry):
        return yarn_attention(_known(self.factor))

    def ramp(self, geometry: RopeGeometry) -> torch.Tensor:
        """m_j, 1 where a dimension is left alone, 0 where it is interpolated; float64 [d/2].

        Raises:
            ConfigError: no dimension turns between beta_slow and beta_fast times in the window.
        """

        def dimension(turns: float) -> float:  # the j that turns so often in the window
            ratio = geometry.window / (turns * 2 * math.pi)
            return geometry.dim * math.log(ratio) / (2 * math.log(geometry.base))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high: float = min(math.ceil(dimension(self.beta_slow)), geometry.dim - 1)
        if low > high:
            raise ConfigError(
                f"rope={self.name} has no ramp for this model (base {geometry.base:g}, {geometry.dim} rotary "
                f"dimensions, window {geometry.window}) with rope.beta_fast={self.beta_fast:g}, "
                f"rope.beta_slow={self.beta_slow:g}: no dimension turns between so many times; choose "
                "other betas or another method"
            )
        if low == high:
            high += 0.001  # as transformers: no division by zero
        j = torch.arange(geometry.dim // 2, dtype=torch.float64)
        return 1 - ((j - low) / (high - low)).clamp(0, 1)

    def inv_freq(self, geometry, seq_len=None):
        inv_freq, first = self._blended(geometry), self.shifted_from(geometry)
        if first is not None:
            inv_freq[first:] = inv_freq[first:].minimum(geometry.theta()[first:] / _known(self.factor))
        return inv_freq

    def _blended(self, geometry: RopeGeometry) -> torch.Tensor:
        """What stays and what is interpolated, blended; without the shift."""
        m = self.ramp(geometry)
        return geometry.theta() * (m + (1 - m) / _known(self.factor))

    def native(self, geometry):
        if self.shifted_from(geometry) is not None:
            return None
        return {
            "rope_type": "yarn",
            "rope_theta": geometry.base,
            "factor": self.factor,
            "original_max_position_embeddings": geometry.window,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attention_factor,
        }


@dataclass(frozen=True)
class YarnRevised(Yarn):
    """YaRN as the released PoSE code computes it ("revised"): *wavelengths* are blended.

    theta_j / (m_j + (1 - m_j) * s), with the ramp of `Yarn`. Not what transformers calls yarn: at
    s = 8, d = 128 many frequencies of the ramp differ by far more than 1 %.
    Source: dwzhu-pku/PoSE, src/my_modeling_llama.py, `revised_yarn`.
    """

    def _blended(self, geometry):
        m = self.ramp(geometry)
        return geometry.theta() / (m + (1 - m) * _known(self.factor))

    def native(self, geometry):
        return None


@dataclass(frozen=True)
class Llama3(RopeScaling):
    """The scaling of Llama 3.1, transformers' type `llama3`: `NTKByParts` between 1 and 4 turns.

    Args:
        low_freq_factor: turns in the window below which a dimension is divided by s.
        high_freq_factor: turns in the window above which a dimension is left alone.

    Raises:
        ConfigError: a number is not positive, or high_freq_factor <= low_freq_factor.
    """

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        require_number("rope.low_freq_factor", self.low_freq_factor, above=0.0)
        require_number("rope.high_freq_factor", self.high_freq_factor, above=self.low_freq_factor)

    def inv_freq(self, geometry, seq_len=None):
        return _interpolate_by_turns(geometry, _known(self.factor), self.low_freq_factor, self.high_freq_factor)

    def native(self, geometry):
        return _llama3(geometry, _known(self.factor), self.low_freq_factor, self.high_freq_factor)


@dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor for each dimension, found by search.

    theta_j / long_factor_j for texts of more than L0 tokens, theta_j / short_factor_j up to L0.
    Its own attention factor is sqrt(1 + ln s / ln L0), at every length: transformers has one for both lists, so that no
    model could be exported whose factor follows the length. Mixed windows, in which texts up to L0 are to see the
    original model, therefore need attention_factor=1 (as in LongRoPE2's pseudocode); left open it stays LongRoPE's own,
    which is what published factors were found and trained with.

    Args:
        long_factor: d/2 divisors.
        short_factor: d/2 divisors; None leaves the frequencies of texts within the window as they are (all 1, the
            mixed windows of LongRoPE2, arXiv 2502.20082).

    Raises:
        ConfigError: long_factor is not given, or a list holds anything but positive numbers.
    """

    long_factor: Sequence[float] | None = None
    short_factor: Sequence[float] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.long_factor is None:
            raise ConfigError(
                "rope.long_factor is not set: rope=longrope needs a list of divisors, one for every two rotary "
                "dimensions of a head (rope.long_factor=[1.0,1.02,...])"
            )
        for key in ("long_factor", "short_factor"):
            values = getattr(self, key)
            if values is None:
                continue
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ConfigError(f"rope.{key}={values!r} is not accepted: give a list of numbers")
            for i, value in enumerate(values):
                require_number(f"rope.{key}[{i}]", value, above=0.0)

    @property
    def name(self) -> str:
        return "longrope"

    @property
    def depends_on_length(self):
        short = self.short_factor or [1.0] * len(_known(self.long_factor))
        return list(short) != list(_known(self.long_factor))

    def resolve(self, geometry, target_len):
        short = [1.0] * (geometry.dim // 2) if self.short_factor is None else self.short_factor
        for key, values in (("long_factor", _known(self.long_factor)), ("short_factor", short)):
            if len(values) != geometry.dim // 2:
                raise ConfigError(
                    f"rope.{key} has {len(values)} numbers, and this model needs {geometry.dim // 2}: one for every "
                    f"two of its {geometry.dim} rotary dimensions"
                )
        return super(LongRope, replace(self, short_factor=short)).resolve(geometry, target_len)

    def own_attention_factor(self, geometry):
        return longrope_attention(_known(self.factor), geometry.window)

    def inv_freq(self, geometry, seq_len=None):
        divisors = self.long_factor if (seq_len or 0) > geometry.window else self.short_factor
        return geometry.theta() / torch.tensor(_known(divisors), dtype=torch.float64)

    def native(self, geometry):
        return self._longrope(geometry, _known(self.short_factor), _known(self.long_factor))

    @property
    def keeps_short_texts(self) -> bool:
        """Whether the frequencies of texts within the window are the original ones, and other than those beyond."""
        return all(short == 1 for short in _known(self.short_factor)) and any(f != 1 for f in _known(self.long_factor))


@dataclass(frozen=True)
class Searched(LongRope):
    """LongRoPE2 (Shang et al. 2025, arXiv 2502.20082): divisors that `python -m pose.search` has found.

    theta_j / long_factor_j, at every length unless `mixed`.

    Args:
        factors: the folder or file of the search, from which the app fills in the rest.
        mixed: texts within the window keep the model's own frequencies; a mix of plain and skipped examples trains
            both (mixed windows).
        searched_for: base, dim, window and target_len of the search.

    Raises:
        ConfigError: nothing was read; as `LongRope`.
    """

    factors: str | None = None
    mixed: bool = False
    searched_for: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.long_factor is None:
            raise ConfigError(
                "rope.factors is not set: rope=searched needs the folder of a search (python -m pose.search), or its "
                "factors.yaml"
            )
        super().__post_init__()
        if not isinstance(self.mixed, bool):
            raise ConfigError(f"rope.mixed={self.mixed!r} is not accepted: give true or false")
        ones = [1.0] * len(self.long_factor)
        if self.short_factor is not None and [*self.short_factor] != (ones if self.mixed else [*self.long_factor]):
            raise ConfigError(
                "rope.short_factor is worked out by rope=searched: leave it out, or take rope=longrope with both lists"
            )
        wanted = {} if self.searched_for is None else self.searched_for
        numbers = ("base", "dim", "window", "target_len")
        if not isinstance(wanted, Mapping) or not all(
            isinstance(wanted.get(key, 0), int | float) and not isinstance(wanted.get(key, 0), bool) for key in numbers
        ):
            raise ConfigError(
                f"rope.searched_for={wanted!r} is not accepted: give a mapping in which {', '.join(numbers)} are "
                "numbers, as a search leaves it in factors.yaml"
            )

    @property
    def name(self) -> str:
        return "searched"

    @property
    def depends_on_length(self):
        return self.mixed and super().depends_on_length

    def resolve(self, geometry, target_len):
        given = {"base": geometry.base, "dim": geometry.dim, "window": geometry.window, "target_len": target_len}
        wanted = dict(self.searched_for or {})
        other = [
            f"{key} {wanted[key]:g}, and here it is {value:g}"
            for key, value in given.items()
            if wanted.get(key, value) != value
        ]
        if other and geometry.rope_type == "default":
            raise ConfigError(
                f"rope.factors={self.factors} is of a search for {'; '.join(other)}: search for this model and target "
                "(python -m pose.search)"
            )
        short = None if self.mixed else self.long_factor
        return super(Searched, replace(self, short_factor=short)).resolve(geometry, target_len)


@dataclass(frozen=True)
class Theta(RopeScaling):
    """A changed base b' and nothing else (Xiong et al. 2023, arXiv 2309.16039). Exported as `rope_theta`.

    Args:
        theta: b'; None keeps the critical dimension of Liu et al. (arXiv 2310.05209): as many dimensions make a full
            turn in the target as did in the window, b' = b^(ln(s L0 / 2 pi) / ln(L0 / 2 pi)).

    Raises:
        ConfigError: theta is given and is not a number above 1.
    """

    theta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_number("rope.theta", self.theta, above=1.0, optional=True)

    def resolve(self, geometry, target_len):
        scaling = super().resolve(geometry, target_len)
        if self.theta is None and geometry.window <= 2 * math.pi:
            raise ConfigError(f"rope.theta is not set, and its default needs a window above {geometry.window} tokens")
        return scaling if self.theta else replace(scaling, theta=scaling._critical_base(geometry))

    def _critical_base(self, geometry: RopeGeometry) -> float:
        turns = geometry.window / (2 * math.pi)
        return geometry.base ** (math.log(_known(self.factor) * turns) / math.log(turns))

    def inv_freq(self, geometry, seq_len=None):
        return replace(geometry, base=_known(self.theta)).theta()

    def native(self, geometry):
        return {"rope_type": "default", "rope_theta": float(_known(self.theta))}


@dataclass(frozen=True)
class Drope(RopeScaling):
    """DroPE (arXiv 2512.12167): no position signal at all, recalibrated at the original window.

    Every frequency is divided by 1e30: cos is 1 and sin is 0 at every position. The factor changes
    nothing; `attention_factor` is the square root of the softmax scale (for models whose heads are
    rotary as a whole).
    """

    def inv_freq(self, geometry, seq_len=None):
        return geometry.theta() / DROPPED

    def native(self, geometry):
        # No dimension turns so often in a window, so that all are divided.
        return _llama3(geometry, DROPPED, 1e6, 2e6)


@dataclass(frozen=True)
class Cope(RopeScaling):
    """CoPE (Li et al. 2026, arXiv 2602.05258): the lowest frequencies fade to none, "clipped" softly.

    The n = num_tapered lowest frequencies are multiplied by (1 + cos(pi i / (n-1))) / 2, i = 0..n-1: the first of them
    stays, the last is none (a divisor of 1e30, as of `Drope`). Everything above them stays. The factor changes nothing.

    It is a change to any RoPE; the paper trains it over a raised base, 10,000,000 in place of 500,000 for LLaMA-3-8B
    from 8K to 64K (20 of its 64 frequencies): `theta` is for that, and the taper comes after it.
    Source: hrlics/CoPE, modeling_cope.py and train/train_64K.sh. With fewer than 20 frequencies it tapers all, as here.

    Args:
        num_tapered: n, at least 2; at most d/2 are.
        theta: the base b' under the taper; None keeps the model's own.

    Raises:
        ConfigError: num_tapered is no integer of at least 2, or theta is given and is not a number above 1.
    """

    num_tapered: int = 20
    theta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_int("rope.num_tapered", self.num_tapered, at_least=2)
        require_number("rope.theta", self.theta, above=1.0, optional=True)

    def inv_freq(self, geometry, seq_len=None):
        raised = replace(geometry, base=self.theta or geometry.base).theta()
        n = min(self.num_tapered, len(raised))
        raised[-n:] *= (1 + torch.linspace(0, math.pi, n, dtype=torch.float64).cos()) / 2
        return raised.maximum(geometry.theta() / DROPPED)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """What yarn multiplies cos and sin by where its config does not say (arXiv 2309.00071): 0.1 mscale ln(s) + 1.

    Args:
        factor: s, by which the window has grown.
        mscale: DeepSeek's multiplier of the logarithm; 1 is YaRN's own.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention(factor: float, window: int) -> float:
    """What longrope multiplies cos and sin by where its config does not say (LongRoPE, arXiv 2402.13753).

    Args:
        factor: by which the window has grown.
        window: before it has, in tokens.
    """
    return math.sqrt(1 + math.log(factor) / math.log(window)) if factor > 1 else 1.0


def critical_dimension(geometry: RopeGeometry) -> int:
    """d_tcd: the rotary dimensions whose period fits into the window, by the formula.

    2 * ceil((d/2) * log_b(L0 / 2 pi)), within 0..d. Dimensions come in pairs: the frequencies j >= d_tcd / 2 have
    made no full turn in pretraining (Liu et al., arXiv 2310.05209; the theoretical critical dimension of LongRoPE2,
    arXiv 2502.20082: 70 of 128 for LLaMA-3-8B, so from j = 35 on).

    Args:
        geometry: of the unscaled model.

    Returns:
        An even number of dimensions, so j_tcd = d_tcd / 2.
    """
    pairs = geometry.dim / 2 * math.log(geometry.window / (2 * math.pi)) / math.log(geometry.base)
    return 2 * min(max(math.ceil(pairs), 0), geometry.dim // 2)


def real_critical_dimension(geometry: RopeGeometry, periods: float = 10) -> int:
    """d_rcd: the rotary dimensions that pretraining has taken through `periods` turns at least.

    LongRoPE2's hypothesis (arXiv 2502.20082): a dimension that has turned once or twice is not trained well enough,
    so that the real critical dimension lies below `critical_dimension`. The first frequency with
    L0 theta_j / (2 pi) < periods is where the candidates for it begin; 48 of 128 for LLaMA-3-8B (j = 24).

    Args:
        geometry: of the unscaled model.
        periods: turns in the window.

    Returns:
        An even number of dimensions, so j_rcd = d_rcd / 2; 0 where every frequency turns less often, d where none does.
    """
    return 2 * int((geometry.turns() >= periods).sum())


def _known(value: T | None) -> T:
    """What `RopeScaling.resolve` has filled in."""
    if value is None:
        raise ValueError("the scaling is not resolved: call resolve(geometry, target_len) first")
    return value


def _llama3(geometry: RopeGeometry, factor: float, slow: float, fast: float) -> dict[str, Any]:
    """transformers' type `llama3`, which is `_interpolate_by_turns`."""
    return {
        "rope_type": "llama3",
        "rope_theta": geometry.base,
        "factor": factor,
        "original_max_position_embeddings": geometry.window,
        "low_freq_factor": slow,
        "high_freq_factor": fast,
    }


def _interpolate_by_turns(geometry: RopeGeometry, factor: float, slow: float, fast: float) -> torch.Tensor:
    """theta_j (g_j + (1 - g_j) / s), g_j growing from 0 to 1 with the turns of dimension j in the window."""
    theta = geometry.theta()
    g = ((geometry.turns() - slow) / (fast - slow)).clamp(0, 1)
    return theta * (g + (1 - g) / factor)


def _require_ntk_dim(name: str, geometry: RopeGeometry):
    if geometry.dim < 4:
        raise ConfigError(
            f"rope={name} needs at least 4 rotary dimensions (its exponent is d/(d-2)), and this model has "
            f"{geometry.dim}: choose another method"
        )
