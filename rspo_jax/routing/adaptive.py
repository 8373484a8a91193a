"""A router shift that sets its own scale: γ becomes γ^s, with s from what training shows.

RSPO weighs a token by max(γ, gamma_min), γ = exp(−Δ). Whether a given drift Δ is much depends on the model, the
learning rate and the number of updates a rollout, and a fixed floor and a scale of 1 cannot know. Two rules set the
scale s after every step, from the updates of that step:

* `quantile`: the drift at a percentile is taken to the floor, s = −log(gamma_min) / Δ_percentile. At 90 the tenth of
  the tokens that drifted most has the floor's weight, and the others lie above it, however small all drifts are.
* `sample_size`: s grows while the effective sample size of the importance ratios, a share of the tokens, lies below a
  target, and falls while it lies above: log s += rate · (target − share). Drift is punished only as far as the ratios
  degenerate.

Both are smoothed and bounded, and start from s = 1. The paper (arXiv 2510.23027) leaves adaptive tuning of the router
shift to future work: these rules are this library's own. Pure functions of arrays; this file must never know a model,
an objective or an optimizer.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rspo_jax.routing.diagnostics import PERCENTS
from rspo_jax.types import Array

RULES = ("fixed", "quantile", "sample_size")


@dataclass(frozen=True)
class AdaptiveShiftConfig:
    """How the scale of the router shift is found."""

    rule: str = "fixed"
    """fixed: always 1."""
    percent: int = 90
    """Of `quantile`: the percentile of the drift that is taken to the floor."""
    sample_size: float = 0.9
    """Of `sample_size`: the target, a share in (0, 1]."""
    rate: float = 0.5
    """How far a step moves log s: for `quantile` the share of the way to its goal, for `sample_size` a factor."""
    most: float = 100.0
    """s stays between 1 / most and most."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule of the adaptive shift must be one of {RULES}, got {self.rule!r}")
        if self.percent not in PERCENTS:
            raise ValueError(f"percent must be one of {PERCENTS}, which are recorded; got {self.percent}")
        if not 0 < self.sample_size <= 1:
            raise ValueError(f"sample_size is a share of the tokens and must lie in (0, 1], got {self.sample_size}")
        if not 0 < self.rate < math.inf or (self.rule == "quantile" and self.rate > 1):
            raise ValueError(f"rate must be positive, and at most 1 for quantile; got {self.rate}")
        if not 1 < self.most < math.inf:
            raise ValueError(f"most must be above 1 and finite, got {self.most}")

    @property
    def adapts(self) -> bool:
        """Whether the scale ever changes."""
        return self.rule != "fixed"


def scaled(gamma: Array, log_scale: Array) -> Array:
    """γ^s: float32 of any shape, and the scalar log s. Exactly 1 where γ is."""
    return gamma ** jax.lax.stop_gradient(jnp.exp(log_scale))


def next_log_scale(
    log_scale: Array, drift_quantiles: Array, sample_size: Array, gamma_min: float, config: AdaptiveShiftConfig
) -> Array:
    """log s for the next step.

    Args:
      log_scale: float32 scalar, that of this step.
      drift_quantiles: float32 [len(PERCENTS)], of the raw drift −log γ over the tokens of this step's updates, in nats.
      sample_size: float32 scalar, the effective sample size of its importance ratios, as a share.
      gamma_min: the floor, below 1.
      config: the rule.

    Returns:
      float32 scalar. Unchanged where what the rule needs is not finite, and where nothing has drifted.
    """
    bound = math.log(config.most)
    if config.rule == "quantile":
        drift = drift_quantiles[PERCENTS.index(config.percent)]
        usable = jnp.isfinite(drift) & (drift > 0)
        goal = jnp.log(-math.log(gamma_min) / jnp.where(usable, drift, 1))
        change = config.rate * (goal - log_scale)
    elif config.rule == "sample_size":
        usable = jnp.isfinite(sample_size)
        change = config.rate * (config.sample_size - jnp.where(usable, sample_size, 0))
    else:
        return log_scale
    return jnp.clip(log_scale + jnp.where(usable, change, 0), -bound, bound).astype(jnp.float32)
