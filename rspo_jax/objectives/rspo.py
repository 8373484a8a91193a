"""Router-Shift Policy Optimization (RSPO), and Geometric-Mean Policy Optimization (GMPO), which it builds on.

RSPO: D. Zhang, X. Wu, S. Huang, L. Jiang, Y. Hao, L. Dong, Z. Chi, Z. Sui, F. Wei, "Towards Stable and Effective
Reinforcement Learning for Mixture-of-Experts", arXiv 2510.23027; v1 of October 2025, v2 = ACL 2026
(2026.acl-long.1165).
GMPO: Y. Zhao et al., "Geometric-Mean Policy Optimization", arXiv 2507.20673.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp

from rspo_jax.objectives.exponents import bounded_exp
from rspo_jax.objectives.responses import (
    Aggregation,
    ObjectiveConfig,
    Responses,
    RouterShiftOptions,
    check_clip,
    one_sided_clip,
)
from rspo_jax.statistics import Mean
from rspo_jax.types import Array, check_choice

Position = Literal["pre_clip", "post_clip", "post_clip_literal"]


@dataclass(frozen=True)
class GMPOConfig(ObjectiveConfig):
    """Settings of GMPO (arXiv 2507.20673): the bounds −clip_low and clip_high apply to each token's log-ratio d.

    There is no option for a router shift: GMPO with one is RSPO.
    """

    aggregation: ClassVar[Aggregation] = "sequence_mean"

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        check_clip(self.clip_low, self.clip_high)


@dataclass(frozen=True)
class RSPOConfig(RouterShiftOptions):
    """Settings of RSPO (arXiv 2510.23027): the floor of γ, GMPO's bounds, and the position of γ̃.

    * `pre_clip`: c(d + log γ̃). The bounds apply to the weighted ratio, as in the paper's second version.
    * `post_clip`: c(d) + log γ̃. A drifted token always counts less: the intent of the first version.
    * `post_clip_literal`: c(d) + sgn(A)·log γ̃, the first version as it is printed, with the bracket raised to the sign
      of A. It *raises* the weight of drifted tokens in bad responses: an ablation, not a recommendation.

    This library's own choice: bounds of 0.4, which are GMPO's; RSPO's own are not known. The floor of 0.8 is that of
    the second version; the first gives none.
    """

    aggregation: ClassVar[Aggregation] = "sequence_mean"

    gamma_min: float | None = 0.8
    """The floor of γ, in (0, 1]; None turns RSPO into GMPO."""
    clip_low: float = 0.4
    clip_high: float = 0.4
    position: Position = "pre_clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)
        check_choice("position", self.position, Position)


def gmpo(batch: Responses, config: GMPOConfig) -> tuple[Mean, Array]:
    """Return J of Geometric-Mean Policy Optimization.

    Y. Zhao, Y. Liu, J. Liu, J. Chen, X. Wu, Y. Hao, T. Lv, S. Huang, L. Cui, Q. Ye, F. Wan, F. Wei, "Geometric-Mean
    Policy Optimization", https://arxiv.org/abs/2507.20673. Implements the clipped objective of §3 in the log space of
    Algorithm 1:

        J = mean_i A_i · exp(mean_t c(d)),    c(x) = min(x, clip_high) for A_i ≥ 0, max(x, −clip_low) for A_i < 0

    Args:
      batch: log-ratios d [B, T] and advantages [B].
      config: the bounds.

    Returns:
      J before its division, and bool [B, T], True where the clip leaves the token alone. A clipped token still counts
      in the mean over t, so that it scales the gradient of the others.
    """
    clipped, kept = _clip_log_ratio(batch, batch.log_ratio, config)
    return batch.response_mean(batch.advantages * bounded_exp(batch.token_mean(clipped))), kept


def rspo(batch: Responses, config: RSPOConfig) -> tuple[Mean, Array]:
    """Return J of Router-Shift Policy Optimization.

    D. Zhang et al., "Towards Stable and Effective Reinforcement Learning for Mixture-of-Experts",
    https://arxiv.org/abs/2510.23027. Implements the objective of the second version (ACL 2026), GMPO whose ratio is
    rescaled by γ̃ before clipping and aggregation, with c as in `gmpo`:

        J = mean_i A_i · exp(mean_t c(d + log γ̃))

    The other positions of γ̃ are those of `RSPOConfig`. With γ̃ = 1, all of them are GMPO, bit for bit.

    Args:
      batch: log-ratios d and weights γ̃, [B, T], and advantages [B].
      config: the bounds and the position of γ̃.

    Returns:
      J before its division, and bool [B, T], True where the clip leaves the token alone.
    """
    log_weight = jnp.log(batch.weight)
    if config.position == "pre_clip":
        exponent, kept = _clip_log_ratio(batch, batch.log_ratio + log_weight, config)
    else:
        clipped, kept = _clip_log_ratio(batch, batch.log_ratio, config)
        literal = config.position == "post_clip_literal"
        exponent = clipped + (jnp.sign(batch.advantages)[:, None] * log_weight if literal else log_weight)
    return batch.response_mean(batch.advantages * bounded_exp(batch.token_mean(exponent))), kept


def _clip_log_ratio(batch: Responses, log_ratio: Array, config: GMPOConfig | RSPOConfig) -> tuple[Array, Array]:
    """Return c(log_ratio) of GMPO, [B, T], and the mask of the tokens that it leaves alone."""
    kept, bound = one_sided_clip(log_ratio, batch.advantages[:, None], -config.clip_low, config.clip_high)
    return jnp.where(kept, log_ratio, bound), kept
