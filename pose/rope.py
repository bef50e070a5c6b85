"""How a model's rotary frequencies change when its window is extended.

One frozen dataclass per method. Each gives its frequencies in closed form (`frequencies`) and the
form in which plain transformers builds the same ones (`to_hf`), so that a trained model *is* a
plain Hugging Face model and its export cannot differ.

Symbols: d the rotary dimensions of a head, b the base (rope_theta), L0 the model's own window,
s the factor, theta_j = b^(-2j/d) for j in 0..d/2-1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pose.errors import ConfigError


@dataclass(frozen=True)
class RopeGeometry:
    """What a model's config says of its rotary embedding.

    Args:
        base: b, rope_theta.
        dim: d, rotary dimensions of one head.
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


class Frequencies(NamedTuple):
    """A method's result.

    Attributes:
        inv_freq: float64 [d/2], radians per position. Models hold it in float32.
        attention_factor: multiplies cos and sin, so attention logits grow by its square.
    """

    inv_freq: torch.Tensor
    attention_factor: float


@dataclass(frozen=True)
class RopeScaling(ABC):
    """What every method has in common.

    Args:
        factor: s, how many times the window grows; None means target_len / window, worked out by
            `resolve` once the model is known.

    Raises:
        ConfigError: factor is given and is not a number of at least 1.
    """

    factor: float | None = None

    def __post_init__(self):
        require_number("rope.factor", self.factor, at_least=1.0, optional=True)

    def resolve(self, geometry: RopeGeometry, target_len: int) -> "RopeScaling":
        """The same method with its factor filled in.

        Args:
            geometry: of the model to extend.
            target_len: in tokens.

        Raises:
            ConfigError: the model is scaled already, so its base and window are no longer its own.
        """
        if geometry.rope_type != "default":
            raise ConfigError(
                f"rope={self.name} cannot be laid over a checkpoint whose RoPE is already scaled "
                f"(rope_type {geometry.rope_type!r}): start from the unscaled model, or keep its "
                "frequencies with rope=none"
            )
        return replace(self, factor=self.factor or target_len / geometry.window)

    @property
    def name(self) -> str:
        """The method's name in the config group `rope`."""
        return "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__)[1:]

    @abstractmethod
    def frequencies(self, geometry: RopeGeometry) -> Frequencies:
        """The closed form. Needs a factor: call `resolve` first."""

    @abstractmethod
    def to_hf(self, geometry: RopeGeometry) -> dict[str, Any]:
        """transformers' `rope_parameters` that build exactly `frequencies`."""


@dataclass(frozen=True)
class Unscaled(RopeScaling):
    """`rope=none`: the checkpoint's frequencies as they are, whatever they are."""

    def __post_init__(self):
        if self.factor is not None:
            raise ConfigError(f"rope.factor={self.factor!r} means nothing for rope=none: leave it null")

    @property
    def name(self) -> str:
        return "none"

    def resolve(self, geometry, target_len):
        return self

    def frequencies(self, geometry):
        if geometry.rope_type != "default":
            raise ValueError(f"no closed form here for a checkpoint of rope_type {geometry.rope_type!r}")
        return Frequencies(geometry.theta(), 1.0)

    def to_hf(self, geometry):
        return {"rope_type": "default", "rope_theta": geometry.base}


@dataclass(frozen=True)
class Linear(RopeScaling):
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): m -> m/s, so theta_j / s."""

    def frequencies(self, geometry):
        return Frequencies(geometry.theta() / self.factor, 1.0)

    def to_hf(self, geometry):
        return {"rope_type": "linear", "rope_theta": geometry.base, "factor": self.factor}


@dataclass(frozen=True)
class NTK(RopeScaling):
    """Static NTK-aware scaling: plain RoPE with the base b' = b * s^(d/(d-2)).

    The fastest frequency stays, the slowest is divided by exactly s. Being a changed base and
    nothing else, it is exported as `rope_theta`.
    """

    @property
    def name(self) -> str:
        return "ntk"

    def scaled_base(self, geometry: RopeGeometry) -> float:
        """b' = b * s^(d/(d-2))."""
        return geometry.base * self.factor ** (geometry.dim / (geometry.dim - 2))

    def frequencies(self, geometry):
        return Frequencies(replace(geometry, base=self.scaled_base(geometry)).theta(), 1.0)

    def to_hf(self, geometry):
        return {"rope_type": "default", "rope_theta": self.scaled_base(geometry)}


@dataclass(frozen=True)
class Yarn(RopeScaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071) as transformers and vLLM read it.

    Dimensions that turn more than `beta_fast` times in the window keep their frequency, those
    that turn less than `beta_slow` times are divided by s, and *frequencies* are blended linearly
    in between:  theta_j * (m_j + (1 - m_j) / s), m_j the ramp from 1 (fast) to 0 (slow).

    Args:
        beta_fast: turns in the window above which a dimension is left alone.
        beta_slow: turns in the window below which a dimension is fully interpolated.
        attention_factor: multiplies cos and sin; None means 0.1 ln(s) + 1.

    Raises:
        ConfigError: a beta is not positive, or beta_fast <= beta_slow, or attention_factor <= 0.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require_number("rope.beta_slow", self.beta_slow, above=0.0)
        require_number("rope.beta_fast", self.beta_fast, above=self.beta_slow)
        require_number("rope.attention_factor", self.attention_factor, above=0.0, optional=True)

    def resolve(self, geometry, target_len):
        scaling = super().resolve(geometry, target_len)
        default = 0.1 * math.log(scaling.factor) + 1.0
        return replace(scaling, attention_factor=scaling.attention_factor or default)

    def ramp(self, geometry: RopeGeometry) -> torch.Tensor:
        """m_j, 1 where a dimension is left alone, 0 where it is interpolated; float64 [d/2]."""

        def dimension(turns: float) -> float:  # the j that turns so often in the window
            ratio = geometry.window / (turns * 2 * math.pi)
            return geometry.dim * math.log(ratio) / (2 * math.log(geometry.base))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), geometry.dim - 1)
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

    def frequencies(self, geometry):
        m = self.ramp(geometry)
        return Frequencies(geometry.theta() * (m + (1 - m) / self.factor), self.attention_factor)

    def to_hf(self, geometry):
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
    s = 8, d = 128 many frequencies of the ramp differ by far more than 1 %. transformers has no
    type for it, so it is built and exported as `longrope` with the divisors of each dimension.
    """

    def divisors(self, geometry: RopeGeometry) -> torch.Tensor:
        """m_j + (1 - m_j) * s; float64 [d/2]."""
        m = self.ramp(geometry)
        return m + (1 - m) * self.factor

    def frequencies(self, geometry):
        return Frequencies(geometry.theta() / self.divisors(geometry), self.attention_factor)

    def to_hf(self, geometry):
        divisors = self.divisors(geometry).tolist()
        return {
            "rope_type": "longrope",
            "rope_theta": geometry.base,
            "factor": self.factor,
            "original_max_position_embeddings": geometry.window,
            "short_factor": divisors,  # the same at every length: a static method
            "long_factor": divisors,
            "attention_factor": self.attention_factor,
        }


def require_number(key, value, *, at_least=None, above=None, optional=False):
    """Raises ConfigError unless value is a number in the given bounds (or None where optional)."""
    if value is None and optional:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if number and (at_least is None or value >= at_least) and (above is None or value > above):
        return
    bound = f"of at least {at_least:g}" if at_least is not None else f"above {above:g}"
    raise ConfigError(f"{key}={value!r} is not accepted: give a number {bound}{' or null' * optional}")
