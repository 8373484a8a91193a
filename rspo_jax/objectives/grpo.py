"""Group Relative Policy Optimization (GRPO) with PPO's clip, and the objectives that share its formula.

They differ in the mean over a batch, in the bounds, and in the advantages that `rspo_jax.objectives.advantages` makes
for them: Dr. GRPO, DAPO, RLOO and REINFORCE++. The source of each is named with its config.
"""

from dataclasses import dataclass

from rspo_jax.objectives.responses import Aggregation, Responses, RouterShiftOptions, check_clip, clip_ratio
from rspo_jax.statistics import Mean
from rspo_jax.types import Array, check_choice


@dataclass(frozen=True)
class GRPOConfig(RouterShiftOptions):
    """Settings of GRPO (arXiv 2402.03300) and of its family; see `grpo` for the formula.

    Each token's ratio, times γ̃ under a router shift, is clipped to [1 − clip_low, 1 + clip_high].
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Aggregation = "sequence_mean"
    """The mean over a batch: over responses of the mean over their tokens (`sequence_mean`), over all tokens
    (`token_mean`), or over responses of the sum over their tokens, divided by one length (`constant_length`)."""
    constant_length: int | None = None
    """Tokens that the aggregation `constant_length` divides by; None for the T of the arrays. Set it if T changes
    within a run."""
    dual_clip: float | None = None
    """Upper bound of the ratio for A < 0; 3 is usual, None leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip_low, self.clip_high)
        check_choice("aggregation", self.aggregation, Aggregation)
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError(f"constant_length must be at least 1, got {self.constant_length}")
        if self.constant_length is not None and self.aggregation != "constant_length":
            raise ValueError(f"constant_length needs aggregation 'constant_length', got {self.aggregation!r}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip bounds the ratio of bad responses and must exceed 1, got {self.dual_clip}")


@dataclass(frozen=True)
class DrGRPOConfig(GRPOConfig):
    """Settings of Dr. GRPO: advantages without the standard deviation, token sums over one constant length.

    Z. Liu, C. Chen, W. Li, P. Qi et al., "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv
    2503.20783. Implements the objective of §3.2, without a KL term: GRPO's without 1/n_i and without the standard
    deviation of the rewards (advantages "group_centred").
    """

    aggregation: Aggregation = "constant_length"


@dataclass(frozen=True)
class DAPOConfig(GRPOConfig):
    """Settings of DAPO: a wider upper bound ("clip-higher"), and all tokens of a batch count alike.

    Q. Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476. Implements Eq. 8
    but for its constraint. That is dynamic sampling, which is the trainer's, as is the overlong penalty
    (`rspo_jax.objectives.overlong_penalty`).
    """

    clip_high: float = 0.28
    aggregation: Aggregation = "token_mean"


@dataclass(frozen=True)
class RLOOConfig(GRPOConfig):
    """Settings of RLOO, REINFORCE with a leave-one-out baseline (advantages "leave_one_out").

    A. Ahmadian, C. Cremer, M. Gallé, M. Fadaee, J. Kreutzer, O. Pietquin, A. Üstün, S. Hooker, "Back to Basics:
    Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", arXiv 2402.14740. This library's
    own choice: PPO's clip and the token mean, which allow several updates with one rollout. On-policy, the clip does
    nothing.
    """

    aggregation: Aggregation = "token_mean"


@dataclass(frozen=True)
class ReinforcePPConfig(GRPOConfig):
    """Settings of REINFORCE++: advantages normalised over the whole batch (advantages "batch"), PPO's clip, token mean.

    J. Hu, J. K. Liu, H. Xu, W. Shen, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage
    Normalization", arXiv 2501.03262. A KL term is not part of the rewards here; `rspo_jax.objectives.penalties` has it
    as a penalty.
    """

    aggregation: Aggregation = "token_mean"


def grpo(batch: Responses, config: GRPOConfig) -> tuple[Mean, Array]:
    """Return J of Group Relative Policy Optimization, and of the objectives that share its formula.

    Z. Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    https://arxiv.org/abs/2402.03300. Implements Eq. 3 without its KL term, which is a penalty of its own here. The clip
    is Eq. 7 of J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov, "Proximal Policy Optimization Algorithms",
    https://arxiv.org/abs/1707.06347. `dual_clip` is Eq. 5 of D. Ye et al., "Mastering Complex Control in MOBA Games
    with Deep Reinforcement Learning", https://arxiv.org/abs/1912.09729.

        J = mean of min(w·γ̃·A_i, clip(w·γ̃)·A_i), and for A_i < 0 of no less than dual_clip·A_i

    The mean is the config's `aggregation`. The router shift (γ̃ ≠ 1) is an addition of RSPO's paper (arXiv 2510.23027),
    which pairs it with GRPO too.

    Args:
      batch: log-ratios d and weights γ̃, [B, T], and advantages [B].
      config: the bounds and the aggregation.

    Returns:
      J before its division, and bool [B, T], True where the clip leaves the token alone.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio, kept = clip_ratio(batch.log_ratio, batch.weight, batch.advantages[:, None], low, high, config.dual_clip)
    return batch.aggregate(batch.advantages, ratio, config), kept
