"""Corrections for a sampler whose log-probabilities are not the trainer's: ρ = π_old / μ, token by token.

The responses were drawn from the sampler's μ, but ratios are taken to π_old, the same parameters in the trainer's own
numerics. A correction multiplies what each token gives to the gradient by a weight that depends on ρ, or drops whole
responses. Any objective can be corrected, by `weighted_gradient` on its `log_probs`: for objectives that are sums over
tokens that is the gradient of the published form, token loss × weight. Pure functions of arrays; this file must never
know a model, a sampler or an objective.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.statistics import Statistic, Sum, at_least_float32, masked_mean
from rspo_jax.types import Array

KINDS = ("none", "tis", "icepop", "sequence_rejection")


@dataclass(frozen=True)
class CorrectionConfig:
    """Which correction, and the bounds of each.

    * `tis`, truncated importance sampling: weight min(ρ, tis_cap).
    * `icepop`: weight ρ where icepop_low ≤ ρ ≤ icepop_high, else 0; the token still counts in the denominators.
    * `sequence_rejection`: a response whose geometric-mean ρ leaves [sequence_low, sequence_high] is masked out, and
      no longer counts in the denominators; the others are left alone.
    """

    kind: str = "none"
    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    sequence_low: float = 0.999
    sequence_high: float = 1.001

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of correction must be one of {KINDS}, got {self.kind!r}")
        if not self.tis_cap > 0:
            raise ValueError(f"tis_cap must be positive, got {self.tis_cap}")
        for name in ("icepop", "sequence"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if not 0 <= low < high:
                raise ValueError(f"{name}_low and {name}_high must satisfy 0 ≤ low < high, got {low} and {high}")


class Correction(NamedTuple):
    """What a correction makes of a batch."""

    weights: Array
    """float32 [B, T] for `weighted_gradient`; 1 on padding."""
    mask: Array
    """bool [B, T]: the response tokens that are left. What an objective takes, and its `weight`."""
    statistics: dict[str, Statistic]


def correct(old_log_probs: Array, sampler_log_probs: Array, mask: Array, config: CorrectionConfig) -> Correction:
    """The weight of each token, and the mask of the responses that are left. Without gradient.

    Args:
      old_log_probs: float [B, T], log π_old, the old policy in the trainer's numerics.
      sampler_log_probs: float [B, T], log μ of the distribution drawn from.
      mask: bool [B, T], True on response tokens. What the arrays hold elsewhere has no effect.
      config: the kind of correction and its bounds.

    Returns:
      The correction. Its statistics: for tis `correction_truncated`, for icepop `correction_dropped_tokens` (shares of
      the response tokens), for both `correction_weight_mean`; for sequence_rejection `correction_dropped_responses`, a
      count, and `correction_dropped_fraction` of the responses that have tokens. None for the kind "none".

    Raises:
      ValueError: if the shapes differ.
    """
    for name, array in {"sampler_log_probs": sampler_log_probs, "mask": mask}.items():
        if array.shape != old_log_probs.shape:
            raise ValueError(f"{name} must have the shape of old_log_probs, {old_log_probs.shape}; got {array.shape}")
    old_log_probs = jax.lax.stop_gradient(at_least_float32(old_log_probs))
    log_ratio = jnp.where(mask, old_log_probs - sampler_log_probs.astype(old_log_probs.dtype), 0)
    ratio, ones = jnp.exp(log_ratio), jnp.ones_like(log_ratio)
    if config.kind == "tis":
        truncated = ratio > config.tis_cap
        weights = jnp.where(mask, jnp.where(truncated, config.tis_cap, ratio), 1).astype(ratio.dtype)
        return Correction(weights, mask, {"correction_truncated": _share(truncated, mask)} | _weights(weights, mask))
    if config.kind == "icepop":
        dropped = mask & ((ratio < config.icepop_low) | (ratio > config.icepop_high))
        weights = jnp.where(dropped, 0, ratio)
        return Correction(weights, mask, {"correction_dropped_tokens": _share(dropped, mask)} | _weights(weights, mask))
    if config.kind == "sequence_rejection":
        present = jnp.any(mask, axis=-1)
        lengths = jnp.sum(mask, axis=-1, dtype=log_ratio.dtype)
        mean = jnp.sum(log_ratio, axis=-1) / jnp.maximum(lengths, 1)
        rejected = present & ((mean < _log(config.sequence_low)) | (mean > _log(config.sequence_high)))
        return Correction(
            ones,
            mask & ~rejected[:, None],
            {
                "correction_dropped_responses": Sum(jnp.sum(rejected, dtype=jnp.float32)),
                "correction_dropped_fraction": _share(rejected, present),
            },
        )
    return Correction(ones, mask, {})


def weighted_gradient(log_probs: Array, weights: Array) -> Array:
    """w·log π + sg[(1 − w)·log π]: the log-probabilities as they are, with their gradient multiplied by w.

    Args:
      log_probs: float [B, T].
      weights: float [B, T], taken without gradient.

    Returns:
      float32 [B, T], bit for bit the log-probabilities where they are finite.
    """
    log_probs = at_least_float32(log_probs)
    value = jax.lax.stop_gradient(log_probs)
    weights = jax.lax.stop_gradient(weights.astype(log_probs.dtype))
    return value + weights * (log_probs - value)  # the two parts of the formula, added up, would round


def _share(condition: Array, mask: Array) -> Statistic:
    return masked_mean(condition.astype(jnp.float32), mask)


def _weights(weights: Array, mask: Array) -> dict[str, Statistic]:
    return {"correction_weight_mean": masked_mean(weights, mask)}


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf
