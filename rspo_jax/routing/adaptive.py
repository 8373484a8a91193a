"""A router shift that sets its own scale: γ becomes γ^s, with s set by rules from what training shows.

RSPO weighs a token by max(γ, gamma_min), γ = exp(−Δ). Whether a given drift Δ is large depends on the model, the
learning rate and the number of updates a rollout. A fixed floor and a scale of 1 take no account of that. Two rules set
the scale s after every step, from the updates of that step:

* `quantile`: the drift at a percentile is taken to the floor, s = −log(gamma_min) / Δ_percentile. At 90, the tenth of
  the tokens that drifted most gets the floor's weight and all others more, however small all drifts are.
* `sample_size`: s grows while the effective sample size of the importance ratios, a share of the tokens, lies below a
  target, and falls while it lies above: log s += rate · (target − share). Drift is punished only as far as the ratios
  degenerate.

Both are smoothed and bounded, and start from s = 1. These rules are this library's own: the paper (RSPO, arXiv
2510.23027) leaves adaptive tuning of the router shift to future work.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from rspo_jax.routing.diagnostics import PERCENTS
from rspo_jax.types import Array, check_choice

AdaptiveRule = Literal["fixed", "quantile", "sample_size"]


@dataclass(frozen=True)
class AdaptiveShiftConfig:
    """Settings of the rule that sets the scale of the router shift."""

    rule: AdaptiveRule = "fixed"
    """The rule; `fixed` keeps the scale at 1."""
    percent: int = 90
    """For `quantile`: the percentile of the drift that is taken to the floor."""
    sample_size: float = 0.9
    """For `sample_size`: the target, a share in (0, 1]."""
    rate: float = 0.5
    """Size of a step in log s: for `quantile` the share of the way to its goal, for `sample_size` a factor."""
    most: float = 100.0
    """Bound of the scale: s stays between 1 / most and most."""

    def __post_init__(self) -> None:
        check_choice("adaptive_shift.rule", self.rule, AdaptiveRule)
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
        """True if the scale can change."""
        return self.rule != "fixed"


def scaled(gamma: Array, log_scale: Array) -> Array:
    """Return γ^s of float32 ratios γ of any shape and a scalar log s. Exactly 1 where γ is."""
    return gamma ** jax.lax.stop_gradient(jnp.exp(log_scale))


def next_log_scale(
    log_scale: Array, drift_quantiles: Array, sample_size: Array, gamma_min: float, config: AdaptiveShiftConfig
) -> Array:
    """Return log s for the next step, by this library's own rules (see above).

    Args:
      log_scale: float32 scalar, log s of this step.
      drift_quantiles: float32 [len(PERCENTS)], quantiles of the raw drift −log γ, in nats, over the tokens of this
        step's updates.
      sample_size: float32 scalar, the effective sample size of its importance ratios, as a share.
      gamma_min: the floor, below 1.
      config: the rule.

    Returns:
      float32 scalar. Unchanged where the rule's input is not finite, and where nothing has drifted.
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
