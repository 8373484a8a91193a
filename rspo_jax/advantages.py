"""Group-relative advantages: how much better a response is than its siblings from the same prompt.

Pure functions of rewards. This file must never know where rewards come from.
"""

import jax.numpy as jnp

from rspo_jax.precision import at_least_float32
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
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have axes [prompts, group], got shape {rewards.shape}")
    if scale and rewards.shape[1] < 2:
        raise ValueError("a group of 1 has no standard deviation: use scale=False or at least 2 samples a prompt")
    rewards = at_least_float32(rewards)
    # Rounding of the mean would otherwise turn equal rewards into advantages of ±1e-8 / 1e-6.
    all_equal = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    centred = jnp.where(all_equal, 0, rewards - jnp.mean(rewards, axis=1, keepdims=True))
    if not scale:
        return centred
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + STD_EPSILON)
