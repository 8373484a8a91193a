"""CISPO: policy optimization that clips importance weights instead of updates.

MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", arXiv 2506.13585, §3.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rspo_jax.objectives.exponents import bounded_exp
from rspo_jax.objectives.responses import Aggregation, Responses, RouterShiftOptions, check_clip
from rspo_jax.statistics import Mean
from rspo_jax.types import Array


@dataclass(frozen=True)
class CISPOConfig(RouterShiftOptions):
    """Settings of CISPO (arXiv 2506.13585).

    The ratio, a weight without gradient, is clipped to [1 − clip_low, 1 + clip_high]. An absolute cap of c on the ratio
    is clip_high = c − 1: 4 for TRL's cap of 5. The default of 0.2 is verl's.
    """

    aggregation: ClassVar[Aggregation] = "token_mean"

    clip_low: float | None = None
    """None for no lower bound, as in the paper's own runs."""
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)


def cispo(batch: Responses, config: CISPOConfig) -> tuple[Mean, Array]:
    """Return J of CISPO.

    MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    https://arxiv.org/abs/2506.13585. Implements Eq. 4 of §3.1 with the clipped weight of Eq. 5, as a mean over all
    tokens of a batch:

        J = mean_{i,t} sg[clip(w)] · γ̃ · A_i · log π_θ(y_t)

    A token that the clip cuts keeps its gradient, with a smaller weight. This library's own choice: γ̃ multiplies the
    clipped weight, so that a drifted token counts less however far it is clipped.

    Args:
      batch: log-probabilities, log-ratios d and weights γ̃, [B, T], and advantages [B].
      config: the bounds of the weight.

    Returns:
      J before its division, and bool [B, T], True where the clip leaves the weight alone.
    """
    ratio = bounded_exp(jax.lax.stop_gradient(batch.log_ratio))
    low, high = 0 if config.clip_low is None else 1 - config.clip_low, 1 + config.clip_high
    kept = ~((ratio < low) | (ratio > high))
    clipped = jnp.where(kept, ratio, jnp.where(ratio > high, high, low).astype(ratio.dtype))
    return batch.aggregate(batch.advantages, clipped * batch.weight * batch.log_probs, config), kept
