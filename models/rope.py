"""Rotary positions: their frequencies, how a model's context was stretched, and the rotation itself.

Linear interpolation, YaRN and Llama 3's interpolation by parts depend on nothing but numbers in a model's
configuration. Forms that change with the longest sequence at hand (dynamic NTK, LongRoPE) are left out on purpose:
one token would have other log-probabilities in another batch, and a cache would hold keys of several rotations. This
file must never know Flax, a model or its configuration.

Letters: B rows, T tokens, N heads, R size of what is rotated (a head, or the rotary part of it).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

Kind = Literal["linear", "yarn", "llama3"]
OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "yarn": (
        "original_max_positions",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
}
"""What each kind knows besides its factor."""
REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "yarn": ("original_max_positions",),
    "llama3": OWN_FIELDS["llama3"],
}
BETA_FAST = 32.0
BETA_SLOW = 1.0


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies were changed so that a model reads longer texts than it was first trained on.

    A field that is None is one that the model's authors left to its default, or one of another kind.
    """

    kind: Kind
    """"linear": all frequencies are divided by the factor. "yarn": those of few rotations are (arXiv 2309.00071).
    "llama3": those of long waves are."""
    factor: float
    """The stretched context over the original one."""
    original_max_positions: int | None = None
    """YaRN, Llama 3: the longest text before the stretch, in tokens."""
    beta_fast: float | None = None
    """YaRN: pairs that make more rotations than this over the original context keep their frequency; 32 by default."""
    beta_slow: float | None = None
    """YaRN: pairs that make fewer rotations are divided by the factor; 1 by default."""
    attention_factor: float | None = None
    """YaRN: what cosine and sine are multiplied by; by default it follows from the factor and both mscales."""
    mscale: float | None = None
    """YaRN, DeepSeek: makes the attention factor, together with mscale_all_dim. 0 is the same as None."""
    mscale_all_dim: float | None = None
    """YaRN, DeepSeek: also scales the logits (`logit_scale`). 0 is the same as None."""
    truncate: bool | None = None
    """YaRN: whether the ramp between the betas starts and ends at whole pairs; true by default, false in gpt-oss."""
    low_freq_factor: float | None = None
    """Llama 3: waves longer than original_max_positions / this are divided by the factor."""
    high_freq_factor: float | None = None
    """Llama 3: waves shorter than original_max_positions / this are left as they are."""

    def __post_init__(self) -> None:
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise ValueError(f"rope scaling must be one of {kinds}, got {self.kind!r}")
        if not (self.factor >= 1 and math.isfinite(self.factor)):
            raise ValueError(f"the factor of rope scaling must be at least 1, got {self.factor}")
        every = {name for names in OWN_FIELDS.values() for name in names}
        for name in sorted(every - set(OWN_FIELDS[self.kind])):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not for rope scaling of kind {self.kind!r}: leave it out")
        for name in REQUIRED_FIELDS[self.kind]:
            if getattr(self, name) is None:
                raise ValueError(f"rope scaling of kind {self.kind!r} needs {name}")
        for name in OWN_FIELDS[self.kind]:
            value, may_be_zero = getattr(self, name), name in ("mscale", "mscale_all_dim")
            if value is None or name == "truncate":
                continue
            if not (math.isfinite(value) and (value > 0 or (value == 0 and may_be_zero))):
                raise ValueError(
                    f"{name} of rope scaling must be {'0 or more' if may_be_zero else 'above 0'}, got {value}"
                )
        self._check_order()

    def _check_order(self) -> None:
        fast, slow = _or(self.beta_fast, BETA_FAST), _or(self.beta_slow, BETA_SLOW)
        if fast <= slow:
            raise ValueError(f"beta_fast must be above beta_slow, got {fast} and {slow}")
        if self.kind == "llama3":
            assert self.low_freq_factor is not None and self.high_freq_factor is not None
            if self.high_freq_factor <= self.low_freq_factor:
                raise ValueError(
                    "high_freq_factor must be above low_freq_factor, "
                    f"got {self.high_freq_factor} and {self.low_freq_factor}"
                )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, float]:
    """The angle that each pair turns by from one position to the next.

    Args:
      dim: R, the size of what is rotated; even.
      theta: the base: without scaling, pair i turns by theta ** (−2 i / R).
      scaling: how the model's context was stretched, if it was.

    Returns:
      The angles in radians, float32 [R/2], and the factor by which cosine and sine are multiplied.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _of_llama3(frequencies, scaling), 1.0
    kept = jnp.asarray(_kept_by_yarn(dim, theta, scaling))
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept, _attention_factor(scaling)


def _kept_by_yarn(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How much of its frequency each pair keeps: 1 down to 0, along a ramp over the pairs; float32 [R/2].

    In float32 as it goes, like the reference: near 0, where the divided frequency is many times smaller than the kept
    one, a ramp of higher precision would be another one.
    """
    assert scaling.original_max_positions is not None
    most_rotations = scaling.original_max_positions / (2 * math.pi)  # of the first pair

    def pair_of(rotations: float) -> float:
        """Which pair makes so many rotations over the original context, as a fraction."""
        return dim * math.log(most_rotations / rotations) / (2 * math.log(theta))

    first, last = pair_of(_or(scaling.beta_fast, BETA_FAST)), pair_of(_or(scaling.beta_slow, BETA_SLOW))
    if scaling.truncate is None or scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = 0.001 if first == last else last - first
    pairs = np.arange(dim // 2, dtype=np.float32)
    return 1 - np.clip((pairs - np.float32(first)) / np.float32(width), 0, 1)


def _of_llama3(frequencies: Array, scaling: RopeScaling) -> Array:
    """Long waves are divided by the factor, short ones are kept, and between the two it changes with 1 / wave."""
    assert scaling.low_freq_factor and scaling.high_freq_factor and scaling.original_max_positions
    waves_in_context = scaling.original_max_positions / (2 * math.pi) * frequencies
    kept = (waves_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    """1 + mscale · ln(factor) / 10, section 3.4 of the paper."""
    return 0.1 * mscale * math.log(factor) + 1.0


def logit_scale(head_dim: int, scaling: RopeScaling | None = None) -> float:
    """What attention multiplies its logits by: 1 / √head_dim, times DeepSeek's correction if mscale_all_dim is given.

    Models other than DeepSeek's with a YaRN scaling have no mscale_all_dim and no correction.

    Args:
      head_dim: size of a key, its part without rotation included.
      scaling: of the rotary positions, if there is one.
    """
    correction = _magnitude(scaling.factor, scaling.mscale_all_dim) if scaling and scaling.mscale_all_dim else 1.0
    return head_dim**-0.5 * correction * correction


def rotary_angles(positions: Array, dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, times the attention factor of the scaling.

    Args:
      positions: int32 [B, T].
      dim: R, the size of what is rotated; even.
      theta: as for `inverse_frequencies`.
      scaling: as for `inverse_frequencies`.

    Returns:
      Cosine and sine, float32 [B, T, 1, R/2].
    """
    frequencies, factor = inverse_frequencies(dim, theta, scaling)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return (cosine, sine) if factor == 1 else (cosine * factor, sine * factor)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotates the pairs (i, i + R/2) of [B, T, N, R] in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return _rotated(first, second, cosine, sine).astype(x.dtype)


def rotate_pairs(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotates the pairs (2 i, 2 i + 1) of [B, T, N, R] in float32, and puts their halves apart, as DeepSeek does.

    The result is laid out like that of `rotate`: the rotated first halves of all pairs, then the second halves. The
    products of queries and keys are the same as in the order of the input, as long as both are rotated by this.
    """
    x32 = x.astype(jnp.float32)
    return _rotated(x32[..., 0::2], x32[..., 1::2], cosine, sine).astype(x.dtype)


def _rotated(first: Array, second: Array, cosine: Array, sine: Array) -> Array:
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
