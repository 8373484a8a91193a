"""Soft Adaptive Policy Optimization (SAPO): a smooth gate instead of a clip.

C. Gao, C. Zheng, X.-H. Chen, K. Dang, S. Liu, B. Yu, A. Yang, S. Bai, J. Zhou, J. Lin, "Soft Adaptive Policy
Optimization", arXiv 2511.20347.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rspo_jax.objectives.responses import Aggregation, Responses, RouterShiftOptions
from rspo_jax.statistics import Mean
from rspo_jax.types import Array

SATURATED_LOG_RATIO = 20.0
"""The log-ratio at which the gate is taken to be shut: σ(τ(e^20 − 1)) is 1 and flat to any precision."""


@dataclass(frozen=True)
class SAPOConfig(RouterShiftOptions):
    """Settings of SAPO (arXiv 2511.20347): the temperatures τ of the gate. A larger τ falls off faster."""

    aggregation: ClassVar[Aggregation] = "sequence_mean"

    tau_positive: float = 1.0
    """τ for A > 0."""
    tau_negative: float = 1.05
    """τ for A ≤ 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tau in {"tau_positive": self.tau_positive, "tau_negative": self.tau_negative}.items():
            if not 0 < tau < math.inf:
                raise ValueError(f"{name} must be positive, got {tau}")


def sapo(batch: Responses, config: SAPOConfig) -> tuple[Mean, Array]:
    """Return J of Soft Adaptive Policy Optimization.

    C. Gao et al., "Soft Adaptive Policy Optimization", https://arxiv.org/abs/2511.20347. Implements Eq. 5 with the gate
    of Eq. 6, τ by the sign of A_i:

        J = mean_i mean_t (4/τ) · σ(τ(w·γ̃ − 1)) · A_i

    This library's own choice: γ̃ multiplies the ratio inside the gate.

    Args:
      batch: log-ratios d and weights γ̃, [B, T], and advantages [B].
      config: the temperatures.

    Returns:
      J before its division, and bool [B, T], all True: nothing is cut.
    """
    saturated = batch.log_ratio > SATURATED_LOG_RATIO  # exp would overflow, and its gradient times 0 be NaN
    log_ratio = jnp.where(saturated, jnp.asarray(SATURATED_LOG_RATIO, batch.log_ratio.dtype), batch.log_ratio)
    tau = jnp.where(batch.advantages > 0, config.tau_positive, config.tau_negative).astype(log_ratio.dtype)[:, None]
    x = tau * (jnp.exp(log_ratio) * batch.weight - 1)
    # The derivative of σ is σ(x)·(1 − σ(x)); where x is large, the difference cancels, and 1 − σ(−x) does not.
    rising = x > 0
    small = jax.nn.sigmoid(jnp.where(rising, -x, x))
    gate = 4 / tau * jnp.where(rising, 1 - small, small)
    return batch.aggregate(batch.advantages, gate, config), jnp.ones_like(batch.mask)
