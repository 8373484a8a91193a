"""Rotary positions: frequencies, their scaling to longer contexts, and the rotation itself.

Linear interpolation, YaRN and Llama 3's interpolation by parts depend only on numbers in a model's configuration.
Forms that change with the longest sequence at hand (dynamic NTK, LongRoPE) are left out on purpose: a token would have
other log-probabilities in another batch, and a cache would hold keys of several rotations.

Letters: B rows, T tokens, N heads, R size of the rotated part (a head, or the rotary part of it).
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.types import check_choice

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
"""Fields that each kind may set besides its factor."""
REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "yarn": ("original_max_positions",),
    "llama3": OWN_FIELDS["llama3"],
}
"""Those among them that it must set."""
BETA_FAST = 32.0
BETA_SLOW = 1.0


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, which lets a model read longer texts than it was first trained on.

    A field is None where the model's authors left it to its default, or where it belongs to another kind.
    """

    kind: Kind
    """"linear" divides all frequencies by the factor, "yarn" those of few rotations (arXiv 2309.00071), "llama3" those
    of long waves."""
    factor: float
    """Length of the stretched context over that of the original one."""
    original_max_positions: int | None = None
    """YaRN, Llama 3: length of the original context, in tokens."""
    beta_fast: float | None = None
    """YaRN: pairs that make more rotations than this over the original context keep their frequency; 32 by default."""
    beta_slow: float | None = None
    """YaRN: the frequency of pairs that make fewer rotations is divided by the factor; 1 by default."""
    attention_factor: float | None = None
    """YaRN: factor on cosine and sine; by default it follows from `factor` and both mscales."""
    mscale: float | None = None
    """YaRN, DeepSeek: determines the attention factor, together with mscale_all_dim. 0 is the same as None."""
    mscale_all_dim: float | None = None
    """YaRN, DeepSeek: also scales the logits (`logit_scale`). 0 is the same as None."""
    truncate: bool | None = None
    """YaRN: if true, the ramp between the betas starts and ends at whole pairs; true by default, false in gpt-oss."""
    low_freq_factor: float | None = None
    """Llama 3: the frequency of waves longer than original_max_positions / this is divided by the factor."""
    high_freq_factor: float | None = None
    """Llama 3: waves shorter than original_max_positions / this keep their frequency."""

    def __post_init__(self) -> None:
        check_choice("rope scaling", self.kind, Kind)
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
        fast, slow = _or(self.beta_fast, BETA_FAST), _or(self.beta_slow, BETA_SLOW)
        if fast <= slow:
            raise ValueError(f"beta_fast must be above beta_slow, got {fast} and {slow}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor must be above low_freq_factor, got {high} and {low}")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, float]:
    """Return the angle that each pair turns by from one position to the next.

    Args:
      dim: R, the size of the rotated part; even.
      theta: the base: without scaling, pair i turns by theta ** (−2 i / R).
      scaling: the scaling to a longer context, if there is one.

    Returns:
      The angles in radians, float32 [R/2], and the factor by which cosine and sine are multiplied.
    """
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    attention_factor = 1.0
    if scaling.kind == "llama3":
        # Long waves are divided by the factor and short ones kept; in between, the mixture is linear in 1 / wavelength.
        assert scaling.low_freq_factor and scaling.high_freq_factor and scaling.original_max_positions
        waves_in_context = scaling.original_max_positions / (2 * math.pi) * frequencies
        kept = (waves_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = jnp.clip(kept, 0, 1)
    else:
        kept = jnp.asarray(_kept_by_yarn(dim, theta, scaling))
        if scaling.attention_factor is not None:
            attention_factor = scaling.attention_factor
        elif scaling.mscale and scaling.mscale_all_dim:
            attention_factor = _magnitude(scaling.factor, scaling.mscale)
            attention_factor = attention_factor / _magnitude(scaling.factor, scaling.mscale_all_dim)
        else:
            attention_factor = _magnitude(scaling.factor, 1.0)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept, attention_factor


def _kept_by_yarn(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Return the share of its frequency that each pair keeps, from 1 down to 0 along a ramp over the pairs.

    The ramp is computed in float32, like the reference: near 0, where the divided frequency is many times smaller than
    the kept one, one of higher precision would differ.

    Returns:
      float32 [R/2].
    """
    assert scaling.original_max_positions is not None
    most_rotations = scaling.original_max_positions / (2 * math.pi)  # of the first pair

    def pair_of(rotations: float) -> float:
        """Return the index, as a fraction, of the pair that makes so many rotations over the original context."""
        return dim * math.log(most_rotations / rotations) / (2 * math.log(theta))

    first, last = pair_of(_or(scaling.beta_fast, BETA_FAST)), pair_of(_or(scaling.beta_slow, BETA_SLOW))
    if scaling.truncate is None or scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = 0.001 if first == last else last - first
    pairs = np.arange(dim // 2, dtype=np.float32)
    return 1 - np.clip((pairs - np.float32(first)) / np.float32(width), 0, 1)


def _magnitude(factor: float, mscale: float) -> float:
    """Return 1 + mscale · ln(factor) / 10 (section 3.4 of the YaRN paper)."""
    return 0.1 * mscale * math.log(factor) + 1.0


def logit_scale(head_dim: int, scaling: RopeScaling | None = None) -> float:
    """Return the factor on the logits of attention: 1 / √head_dim, times DeepSeek's correction if there is one.

    The correction comes with mscale_all_dim, which only DeepSeek's models set.

    Args:
      head_dim: size of a key, including the part that is not rotated.
      scaling: of the rotary positions, if there is one.
    """
    correction = _magnitude(scaling.factor, scaling.mscale_all_dim) if scaling and scaling.mscale_all_dim else 1.0
    return head_dim**-0.5 * correction * correction


def rotary_angles(positions: Array, dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """Return cosine and sine of the rotary angles, times the attention factor of the scaling.

    Args:
      positions: int32 [B, T].
      dim: R, the size of the rotated part; even.
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
    """Rotate the pairs (i, i + R/2) of [B, T, N, R], computing in float32; the result has the dtype of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return _rotated(first, second, cosine, sine).astype(x.dtype)


def rotate_pairs(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotate the pairs (2 i, 2 i + 1) of [B, T, N, R] in float32 and separate their halves, as DeepSeek does.

    The result is laid out like that of `rotate`: the rotated first halves of all pairs, then the second halves.
    Products of queries and keys are the same as in the order of the input, provided both are rotated this way.
    """
    x32 = x.astype(jnp.float32)
    return _rotated(x32[..., 0::2], x32[..., 1::2], cosine, sine).astype(x.dtype)


def _rotated(first: Array, second: Array, cosine: Array, sine: Array) -> Array:
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
