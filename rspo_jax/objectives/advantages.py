"""Advantages: how much better a response is than others, by the four estimators of the table `ADVANTAGES`; and the soft
penalty for overlong responses, which is a part of the reward.
"""

from typing import Protocol

import jax.numpy as jnp

from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array

STD_EPSILON = 1e-6


def group_advantages(rewards: Array, scale: bool = True, valid: Array | None = None) -> Array:
    """Return A = (R − mean) / (std + 1e-6) within each group, the advantages of GRPO.

    Z. Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    https://arxiv.org/abs/2402.03300. The standard deviation is the unbiased one, as in verl and Tunix.

    Args:
      rewards: float [prompts, group].
      scale: if true, divide by the group's standard deviation (ddof 1); if false, only centre.
      valid: bool [prompts, group]; False for responses that count for nothing. None: all of them count.

    Returns:
      float32 [prompts, group]; exactly 0 in groups whose rewards are all equal, and for responses that do not count.

    Raises:
      ValueError: if rewards do not have two axes, or if groups of one are to be scaled.
    """
    _check_rewards(rewards, valid)
    if scale and rewards.shape[1] < 2:
        raise ValueError("a group of 1 has no standard deviation: use scale=False or at least 2 samples a prompt")
    above = _above_lowest(at_least_float32(rewards), 1, valid)
    centred = _centred(above, 1, valid)
    return centred / (_std(above, 1, valid) + STD_EPSILON) if scale else centred


def centred_group_advantages(rewards: Array, valid: Array | None = None) -> Array:
    """Return A = R − mean within each group, the advantages of Dr. GRPO: `group_advantages` without scaling.

    Z. Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective", https://arxiv.org/abs/2503.20783.
    Implements the advantage of §3.2.
    """
    return group_advantages(rewards, scale=False, valid=valid)


def leave_one_out_advantages(rewards: Array, valid: Array | None = None) -> Array:
    """Return A = R − the mean of the group's other rewards, the advantages of RLOO.

    A. Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", https://arxiv.org/abs/2402.14740. Computed as group / (group − 1) times the centred reward, which is equal.

    Args:
      rewards: float [prompts, group].
      valid: bool [prompts, group]; False for responses that count for nothing. None: all of them count.

    Returns:
      float32 [prompts, group]; exactly 0 in groups whose rewards are all equal, for the only response of a group that
      counts, and for responses that do not count.

    Raises:
      ValueError: if rewards do not have two axes, or if groups are of one.
    """
    _check_rewards(rewards, valid)
    group = rewards.shape[1]
    if group < 2:
        raise ValueError("a group of 1 leaves no other reward to compare with: use at least 2 samples a prompt")
    centred = _centred(_above_lowest(at_least_float32(rewards), 1, valid), 1, valid)
    if valid is None:
        return centred * (group / (group - 1))
    counted = jnp.sum(valid, axis=1, keepdims=True, dtype=centred.dtype)
    return centred * (counted / jnp.maximum(counted - 1, 1))


def batch_advantages(rewards: Array, valid: Array | None = None) -> Array:
    """Return A = (R − mean) / (std + 1e-6) over the whole batch, the advantages of REINFORCE++.

    J. Hu, J. K. Liu, H. Xu, W. Shen, "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage
    Normalization", https://arxiv.org/abs/2501.03262. Implements the plain variant, where the batch is the only
    baseline; the variant "w/ Baseline" centres each group first. This library's own choice: every response counts once,
    whatever its length, and the standard deviation is the unbiased one.

    Args:
      rewards: float [prompts, group].
      valid: bool [prompts, group]; False for responses that count for nothing. None: all of them count.

    Returns:
      float32 [prompts, group]; exactly 0 if all rewards are equal, and for responses that do not count.

    Raises:
      ValueError: if rewards do not have two axes, or if there is only one reward.
    """
    _check_rewards(rewards, valid)
    if rewards.size < 2:
        raise ValueError("a batch of 1 has no standard deviation: use at least 2 responses")
    above = _above_lowest(at_least_float32(rewards), None, valid)
    return _centred(above, None, valid) / (_std(above, None, valid) + STD_EPSILON)


class AdvantageEstimator(Protocol):
    """An entry of `ADVANTAGES`."""

    def __call__(self, rewards: Array, *, valid: Array | None = None) -> Array:
        """Return advantages, float32 [prompts, group].

        Args:
          rewards: float [prompts, group].
          valid: bool [prompts, group]; False for responses that count for nothing. None: all of them count.
        """
        ...


ADVANTAGES: dict[str, AdvantageEstimator] = {
    "group": group_advantages,
    "group_centred": centred_group_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch": batch_advantages,
}
"""The estimators by name."""


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


def _above_lowest(rewards: Array, axis: int | None, valid: Array | None) -> Array:
    """Return the rewards minus the lowest one along an axis (all, for None): no advantage depends on their level.

    A sum of large rewards rounds their differences away: in float32, that of 1e6 and 1e6 + 1/16. The lowest one, and
    not any other, leaves rewards of 0 and 1 as they are. Rewards that do not count become 0.
    """
    if valid is None:
        return rewards - jnp.min(rewards, axis=axis, keepdims=True)
    rewards = jnp.where(valid, rewards, jnp.inf)
    return jnp.where(valid, rewards - jnp.min(rewards, axis=axis, keepdims=True), 0)


def _centred(rewards: Array, axis: int | None, valid: Array | None) -> Array:
    """Return the rewards minus their mean along an axis (all, for None); exactly 0 where all of them are equal.

    The rewards are those of `_above_lowest`, among which the ones that do not count change no extreme.
    """
    # The rounding of the mean would otherwise turn equal rewards into advantages of ±1e-8 / 1e-6.
    all_equal = jnp.max(rewards, axis=axis, keepdims=True) == jnp.min(rewards, axis=axis, keepdims=True)
    centred = rewards - jnp.mean(rewards, axis=axis, keepdims=True, where=valid)
    return jnp.where(all_equal if valid is None else all_equal | ~valid, 0, centred)


def _std(rewards: Array, axis: int | None, valid: Array | None) -> Array:
    """Return the unbiased standard deviation along an axis (of all, for None); 0 where fewer than two rewards count."""
    if valid is None:
        return jnp.std(rewards, axis=axis, ddof=1, keepdims=True)
    std = jnp.std(rewards, axis=axis, ddof=1, keepdims=True, where=valid)
    return jnp.where(jnp.sum(valid, axis=axis, keepdims=True) > 1, std, 0)


def _check_rewards(rewards: Array, valid: Array | None) -> None:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have axes [prompts, group], got shape {rewards.shape}")
    if valid is not None and valid.shape != rewards.shape:
        raise ValueError(f"valid must have the shape of the rewards, {rewards.shape}, got {valid.shape}")
