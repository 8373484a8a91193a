"""Group Sequence Policy Optimization (GSPO), and GSPO-token, its form for advantages of tokens.

C. Zheng, S. Liu, M. Li, X.-H. Chen, B. Yu, C. Gao, K. Dang, Y. Liu, R. Men, A. Yang, J. Zhou, J. Lin, "Group Sequence
Policy Optimization", arXiv 2507.18071. Equation numbers are those of v2.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from rspo_jax.objectives.responses import Aggregation, Responses, RouterShiftOptions, check_clip, clip_ratio
from rspo_jax.statistics import Mean
from rspo_jax.types import Array


@dataclass(frozen=True)
class GSPOConfig(RouterShiftOptions):
    """Settings of GSPO (arXiv 2507.18071).

    The sequence ratio, router shift included, is clipped to [1 − clip_low, 1 + clip_high]. The defaults are the bounds
    of §5.1. They are so narrow that a mean γ̃ below 1 − clip_low cuts every response with a negative advantage and none
    with a positive one: watch the clip fractions by sign.
    """

    aggregation: ClassVar[Aggregation] = "sequence_mean"

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)


@dataclass(frozen=True)
class GSPOTokenConfig(GSPOConfig):
    """Settings of GSPO-token (arXiv 2507.18071, §4.3): the same as for GSPO."""


def gspo(batch: Responses, config: GSPOConfig) -> tuple[Mean, Array]:
    """Return J of Group Sequence Policy Optimization.

    C. Zheng et al., "Group Sequence Policy Optimization", https://arxiv.org/abs/2507.18071. Implements Eq. 5 with the
    sequence ratio of Eq. 7:

        J = mean_i min(s_i·A_i, clip(s_i)·A_i),    s_i = exp(mean_t (d + log γ̃))

    The router shift (γ̃ ≠ 1) is an addition of RSPO's paper (arXiv 2510.23027), which pairs it with GSPO too.

    Args:
      batch: log-ratios d and weights γ̃, [B, T], and advantages [B].
      config: the bounds of s.

    Returns:
      J before its division, and bool [B, T]; a clipped response counts with all its tokens.
    """
    mean_log_ratio = batch.token_mean(batch.log_ratio + jnp.log(batch.weight))
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio, kept = clip_ratio(mean_log_ratio, jnp.ones_like(mean_log_ratio), batch.advantages, low, high)
    return batch.response_mean(batch.advantages * ratio), jnp.broadcast_to(kept[:, None], batch.mask.shape)


def gspo_token(batch: Responses, config: GSPOConfig) -> tuple[Mean, Array]:
    """Return J of GSPO-token, which takes an advantage for each token.

    C. Zheng et al., "Group Sequence Policy Optimization", https://arxiv.org/abs/2507.18071. Implements Eqs. 13 and 14
    of §4.3, where the sequence ratio has no gradient and a ratio of the token, which is 1, carries it:

        J = mean_i mean_t min(s_t·A_t, clip(s_t)·A_t),    s_t = sg[exp(mean_t d)] · exp(mean_t log γ̃) · π_t / sg[π_t]

    This library's own choice: γ̃ stands inside the sequence mean, as in GSPO. With one advantage a response, the
    gradient is then GSPO's.

    Args:
      batch: log-ratios d and weights γ̃, [B, T], and advantages [B] or [B, T].
      config: the bounds of s.

    Returns:
      J before its division, and bool [B, T], True where the clip leaves the token alone.
    """
    log_ratio = jax.lax.stop_gradient(batch.log_ratio)
    mean_log_ratio = batch.token_mean(log_ratio + jnp.log(batch.weight))
    token_log_ratio = mean_log_ratio[:, None] + (batch.log_ratio - log_ratio)
    advantages = jnp.broadcast_to(batch.token_advantages, token_log_ratio.shape)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio, kept = clip_ratio(token_log_ratio, jnp.ones_like(token_log_ratio), advantages, low, high)
    return batch.aggregate(jnp.ones_like(mean_log_ratio), advantages * ratio, config), kept
