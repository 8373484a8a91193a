"""Advantages: how much better a response is than others, by the four estimators of the table `ADVANTAGES`; and the soft
penalty for overlong responses, which is a part of the reward.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array

STD_EPSILON = 1e-6


def group_advantages(rewards: Array, scale: bool = True) -> Array:
    """Return A = (R − mean) / (std + 1e-6) within each group, the advantages of GRPO.

    Z. Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    https://arxiv.org/abs/2402.03300. The standard deviation is the unbiased one, as in verl and Tunix.

    Args:
      rewards: float [prompts, group].
      scale: if true, divide by the group's standard deviation (ddof 1); if false, only centre.

    Returns:
      float32 [prompts, group]; exactly 0 in groups whose rewards are all equal.

    Raises:
      ValueError: if rewards do not have two axes, or if groups of one are to be scaled.
    """
    _check_rewards(rewards)
    if scale and rewards.shape[1] < 2:
        raise ValueError("a group of 1 has no standard deviation: use scale=False or at least 2 samples a prompt")
    above = _above_lowest(at_least_float32(rewards), axis=1)
    centred = _centred(above, axis=1)
    if not scale:
        return centred
    return centred / (jnp.std(above, axis=1, ddof=1, keepdims=True) + STD_EPSILON)


def centred_group_advantages(rewards: Array) -> Array:
    """Return A = R − mean within each group, the advantages of Dr. GRPO: `group_advantages` without scaling.

    Z. Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", https://arxiv.org/abs/2503.20783.
    Implements the advantage of §3.2.
    """
    return group_advantages(rewards, scale=False)


def leave_one_out_advantages(rewards: Array) -> Array:
    """Return A = R − the mean of the group's other rewards, the advantages of RLOO.

    A. Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", https://arxiv.org/abs/2402.14740. Computed as group / (group − 1) times the centred reward, which is equal.

    Args:
      rewards: float [prompts, group].

    Returns:
      float32 [prompts, group]; exactly 0 in groups whose rewards are all equal.

    Raises:
      ValueError: if rewards do not have two axes, or if groups are of one.
    """
    _check_rewards(rewards)
    group = rewards.shape[1]
    if group < 2:
        raise ValueError("a group of 1 leaves no other reward to compare with: use at least 2 samples a prompt")
    return _centred(_above_lowest(at_least_float32(rewards), axis=1), axis=1) * (group / (group - 1))


def batch_advantages(rewards: Array) -> Array:
    """Return A = (R − mean) / (std + 1e-6) over the whole batch, the advantages of REINFORCE++.

    J. Hu, J. K. Liu, H. Xu, W. Shen, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage
    Normalization", https://arxiv.org/abs/2501.03262. Implements the plain variant, where the batch is the only
    baseline; the variant "w/ Baseline" centres each group first. This library's own choice: every response counts once,
    whatever its length, and the standard deviation is the unbiased one.

    Args:
      rewards: float [prompts, group].

    Returns:
      float32 [prompts, group]; exactly 0 if all rewards are equal.

    Raises:
      ValueError: if rewards do not have two axes, or if there is only one reward.
    """
    _check_rewards(rewards)
    if rewards.size < 2:
        raise ValueError("a batch of 1 has no standard deviation: use at least 2 responses")
    above = _above_lowest(at_least_float32(rewards), axis=None)
    return _centred(above, axis=None) / (jnp.std(above, ddof=1) + STD_EPSILON)


ADVANTAGES: dict[str, Callable[[Array], Array]] = {
    "group": group_advantages,
    "group_centred": centred_group_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch": batch_advantages,
}
"""The estimators by name. Each maps rewards, float [prompts, group], to advantages, float32 [prompts, group]."""


def overlong_penalty(lengths: Array, max_tokens: int, buffer: int) -> Array:
    """Return DAPO's soft penalty for overlong responses, to be added to the rewards.

    Q. Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", https://arxiv.org/abs/2503.14476.
    Implements Eq. 13: 0 up to max_tokens − buffer, then a straight line down to −1 at max_tokens, and −1 beyond.
    Lengths count tokens, not characters: the limit counts tokens, and the same text has more of them in one vocabulary
    than in another.

    Args:
      lengths: int, any shape, the response tokens of each response, the stop token included.
      max_tokens: the limit, in tokens.
      buffer: the number of tokens before the limit over which the penalty grows.

    Returns:
      float32 in [−1, 0], the shape of `lengths`.

    Raises:
      TypeError: if lengths are not whole numbers of tokens.
      ValueError: unless 1 ≤ buffer ≤ max_tokens.
    """
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be whole numbers of tokens, got {lengths.dtype}")
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer must lie between 1 and max_tokens, {max_tokens}; got {buffer}")
    excess = lengths.astype(jnp.float32) - (max_tokens - buffer)
    return -jnp.clip(excess / buffer, 0, 1)


def _above_lowest(rewards: Array, axis: int | None) -> Array:
    """Return the rewards minus the lowest one along an axis (all, for None): no advantage depends on their level.

    A sum of large rewards rounds their differences away: in float32, that of 1e6 and 1e6 + 1/16. The lowest one, and
    not any other, leaves rewards of 0 and 1 as they are.
    """
    return rewards - jnp.min(rewards, axis=axis, keepdims=True)


def _centred(rewards: Array, axis: int | None) -> Array:
    """Return the rewards minus their mean along an axis (all, for None); exactly 0 where all of them are equal."""
    # The rounding of the mean would otherwise turn equal rewards into advantages of ±1e-8 / 1e-6.
    all_equal = jnp.max(rewards, axis=axis, keepdims=True) == jnp.min(rewards, axis=axis, keepdims=True)
    return jnp.where(all_equal, 0, rewards - jnp.mean(rewards, axis=axis, keepdims=True))


def _check_rewards(rewards: Array) -> None:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have axes [prompts, group], got shape {rewards.shape}")
