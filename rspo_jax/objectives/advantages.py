"""Advantages: how much better a response is than others, by four estimators. `ADVANTAGES` is the one table of them.
And the soft penalty for overlong responses, a part of the reward.

Pure functions of rewards and lengths. This file must never know where rewards come from.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array

STD_EPSILON = 1e-6


def group_advantages(rewards: Array, scale: bool = True) -> Array:
    """A = (R − mean) / (std + 1e-6) within each group, with the unbiased std (GRPO); without the division: Dr.GRPO.

    Args:
      rewards: float [prompts, group].
      scale: whether to divide by the group's standard deviation (ddof 1).

    Returns:
      float32 [prompts, group]; exactly 0 in groups whose rewards are all equal.

    Raises:
      ValueError: if rewards do not have two axes, or scaling is asked for in groups of one.
    """
    _check_rewards(rewards)
    if scale and rewards.shape[1] < 2:
        raise ValueError("a group of 1 has no standard deviation: use scale=False or at least 2 samples a prompt")
    rewards = at_least_float32(rewards)
    centred = _centred(rewards, axis=1)
    if not scale:
        return centred
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + STD_EPSILON)


def centred_group_advantages(rewards: Array) -> Array:
    """A = R − mean within each group (Dr. GRPO, arXiv 2503.20783). As `group_advantages` without scale."""
    return group_advantages(rewards, scale=False)


def leave_one_out_advantages(rewards: Array) -> Array:
    """A = R − the mean of the group's other rewards (RLOO, arXiv 2402.14740): group/(group − 1) times the centred ones.

    Args:
      rewards: float [prompts, group].

    Returns:
      float32 [prompts, group]; exactly 0 in groups whose rewards are all equal.

    Raises:
      ValueError: if rewards do not have two axes, or groups are of one.
    """
    _check_rewards(rewards)
    group = rewards.shape[1]
    if group < 2:
        raise ValueError("a group of 1 leaves no other reward to compare with: use at least 2 samples a prompt")
    return _centred(at_least_float32(rewards), axis=1) * (group / (group - 1))


def batch_advantages(rewards: Array) -> Array:
    """A = (R − mean) / (std + 1e-6) over the whole batch, with the unbiased std (REINFORCE++, arXiv 2501.03262).

    Groups do not count: the batch is the only baseline, as in the source's own form (its variant "w/ baseline" centres
    each group first). Every response counts once, whatever its length.

    Args:
      rewards: float [prompts, group].

    Returns:
      float32 [prompts, group]; exactly 0 if all rewards are equal.

    Raises:
      ValueError: if rewards do not have two axes, or there is only one.
    """
    _check_rewards(rewards)
    if rewards.size < 2:
        raise ValueError("a batch of 1 has no standard deviation: use at least 2 responses")
    rewards = at_least_float32(rewards)
    return _centred(rewards, axis=None) / (jnp.std(rewards, ddof=1) + STD_EPSILON)


ADVANTAGES: dict[str, Callable[[Array], Array]] = {
    "group": group_advantages,
    "group_centred": centred_group_advantages,
    "leave_one_out": leave_one_out_advantages,
    "batch": batch_advantages,
}
"""Estimator by name: rewards float [prompts, group] -> advantages float32 [prompts, group]."""


def overlong_penalty(lengths: Array, max_tokens: int, buffer: int) -> Array:
    """DAPO's soft punishment of long responses (arXiv 2503.14476), to be added to the rewards.

    0 up to max_tokens − buffer, from there down in a straight line to −1 at max_tokens, −1 beyond. In tokens: the same
    text may be long in one vocabulary and short in another, and only tokens are what the limit counts.

    Args:
      lengths: int, any shape: response tokens, the stop token included.
      max_tokens: the limit.
      buffer: tokens before the limit over which the penalty grows.

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


def _centred(rewards: Array, axis: int | None) -> Array:
    # Rounding of the mean would otherwise turn equal rewards into advantages of ±1e-8 / 1e-6.
    all_equal = jnp.max(rewards, axis=axis, keepdims=True) == jnp.min(rewards, axis=axis, keepdims=True)
    return jnp.where(all_equal, 0, rewards - jnp.mean(rewards, axis=axis, keepdims=True))


def _check_rewards(rewards: Array) -> None:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have axes [prompts, group], got shape {rewards.shape}")
