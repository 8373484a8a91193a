"""Corrections for a sampler whose log-probabilities are not the trainer's: ρ = π_old / μ, token by token.

The responses were drawn from the sampler's μ, but ratios are taken to π_old, the same parameters in the trainer's own
numerics. A correction multiplies each token's share of the gradient by a weight that depends on ρ, or drops whole
responses. `weighted_gradient`, applied to the `log_probs` of an objective, corrects any of them. For objectives that
are sums over tokens, this gives the gradient of the published form, token loss × weight.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rspo_jax.objectives.exponents import bounded_exp
from rspo_jax.statistics import Statistic, Sum, at_least_float32, masked_mean
from rspo_jax.types import Array, check_choice

CorrectionKind = Literal["none", "tis", "icepop", "sequence_rejection"]


@dataclass(frozen=True)
class CorrectionConfig:
    """The kind of correction, and the bounds of each kind.

    * `tis`, truncated importance sampling: weight min(ρ, tis_cap). F. Yao, L. Liu, D. Zhang, C. Dong, J. Shang, J. Gao,
      "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl.
    * `icepop`: weight ρ where icepop_low ≤ ρ ≤ icepop_high, else 0; the token still counts in the denominators. Ling
      Team, "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model", arXiv 2510.18855.
    * `sequence_rejection`: a response whose geometric-mean ρ leaves [sequence_low, sequence_high] is masked out and no
      longer counts in the denominators; the others are left alone. The geometric rejection of verl's rollout
      correction (`seq_mean_k1`), with its bounds.
    """

    kind: CorrectionKind = "none"
    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    sequence_low: float = 0.999
    sequence_high: float = 1.001

    def __post_init__(self) -> None:
        check_choice("kind of correction", self.kind, CorrectionKind)
        if not self.tis_cap > 0:
            raise ValueError(f"tis_cap must be positive, got {self.tis_cap}")
        bounds = {
            "icepop": (self.icepop_low, self.icepop_high),
            "sequence": (self.sequence_low, self.sequence_high),
        }
        for name, (low, high) in bounds.items():
            if not 0 <= low < high:
                raise ValueError(f"{name}_low and {name}_high must satisfy 0 ≤ low < high, got {low} and {high}")


class Correction(NamedTuple):
    """The weights and the mask that a correction gives a batch."""

    weights: Array
    """float32 [B, T] for `weighted_gradient`; 1 on padding."""
    mask: Array
    """bool [B, T], True on the response tokens that are left: the mask for an objective and for its `weight`."""
    statistics: dict[str, Statistic]
    """Metrics by name; see `correct`."""


def correct(old_log_probs: Array, sampler_log_probs: Array, mask: Array, config: CorrectionConfig) -> Correction:
    """Return the weight of each token, and the mask of the responses that are left. Neither has a gradient.

    Args:
      old_log_probs: float [B, T], log π_old, the old policy in the trainer's numerics.
      sampler_log_probs: float [B, T], log μ of the distribution that the tokens were drawn from.
      mask: bool [B, T], True on response tokens. What the arrays hold elsewhere has no effect.
      config: the kind of correction and its bounds.

    Returns:
      The correction. Its statistics are, for tis, `correction_truncated` and, for icepop, `correction_dropped_tokens`
      (shares of the response tokens), for both `correction_weight_mean`; for sequence_rejection,
      `correction_dropped_responses`, a count, and `correction_dropped_fraction`, the share of the responses that have
      tokens. There are none for the kind "none".

    Raises:
      ValueError: if the shapes differ.
    """
    for name, array in {"sampler_log_probs": sampler_log_probs, "mask": mask}.items():
        if array.shape != old_log_probs.shape:
            raise ValueError(f"{name} must have the shape of old_log_probs, {old_log_probs.shape}; got {array.shape}")
    old_log_probs = jax.lax.stop_gradient(at_least_float32(old_log_probs))
    log_ratio = jnp.where(mask, old_log_probs - sampler_log_probs.astype(old_log_probs.dtype), 0)
    ratio, ones = bounded_exp(log_ratio), jnp.ones_like(log_ratio)
    if config.kind == "tis":
        truncated = ratio > config.tis_cap
        weights = jnp.where(mask, jnp.where(truncated, config.tis_cap, ratio), 1).astype(ratio.dtype)
        statistics = {
            "correction_truncated": _share(truncated, mask),
            "correction_weight_mean": masked_mean(weights, mask),
        }
        return Correction(weights, mask, statistics)
    if config.kind == "icepop":
        dropped = mask & ((ratio < config.icepop_low) | (ratio > config.icepop_high))
        weights = jnp.where(dropped, 0, ratio)
        statistics = {
            "correction_dropped_tokens": _share(dropped, mask),
            "correction_weight_mean": masked_mean(weights, mask),
        }
        return Correction(weights, mask, statistics)
    if config.kind == "sequence_rejection":
        present = jnp.any(mask, axis=-1)
        lengths = jnp.sum(mask, axis=-1, dtype=log_ratio.dtype)
        mean = jnp.sum(log_ratio, axis=-1) / jnp.maximum(lengths, 1)
        low = math.log(config.sequence_low) if config.sequence_low > 0 else -math.inf
        rejected = present & ((mean < low) | (mean > math.log(config.sequence_high)))
        statistics = {
            "correction_dropped_responses": Sum(jnp.sum(rejected, dtype=jnp.float32)),
            "correction_dropped_fraction": _share(rejected, present),
        }
        return Correction(ones, mask & ~rejected[:, None], statistics)
    return Correction(ones, mask, {})


def weighted_gradient(log_probs: Array, weights: Array) -> Array:
    """Return the log-probabilities as they are, with their gradient multiplied by w: w·log π + sg[(1 − w)·log π].

    Args:
      log_probs: float [B, T], log π.
      weights: float [B, T], w; taken without gradient.

    Returns:
      float32 [B, T], bit for bit the log-probabilities where they are finite.
    """
    log_probs = at_least_float32(log_probs)
    value = jax.lax.stop_gradient(log_probs)
    weights = jax.lax.stop_gradient(weights.astype(log_probs.dtype))
    return value + weights * (log_probs - value)  # the two parts of the formula, added up, would round


def _share(condition: Array, mask: Array) -> Statistic:
    return masked_mean(condition.astype(jnp.float32), mask)
