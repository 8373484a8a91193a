"""The choice of the groups that a step learns from: those whose rewards differ come first."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rspo_jax.sharding import constrain
from rspo_jax.types import RolloutBatch


def is_informative(rewards: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Return True for each group whose rewards differ; the others have no gradient.

    Args:
      rewards: float [prompts, group].
      valid: bool [prompts, group]; False for responses that count for nothing. None: all of them count.

    Returns:
      bool [prompts].
    """
    if valid is None:
        return np.ptp(rewards, axis=1) > 0
    highest = np.max(rewards, axis=1, where=valid, initial=-np.inf)
    return highest > np.min(rewards, axis=1, where=valid, initial=np.inf)


def choose_groups(
    rollouts: list[RolloutBatch], informative: np.ndarray, wanted: int, only_informative: bool
) -> RolloutBatch:
    """Return the responses of `wanted` groups, informative ones first, otherwise in the order they were drawn.

    Args:
      rollouts: one or more rollouts of equal shape, whose rows are whole groups.
      informative: bool, one entry for each group of all rollouts.
      wanted: number of groups.
      only_informative: if True, responses of groups that are not informative are masked out, and so count in no mean
        (dynamic sampling; DAPO, arXiv 2503.14476).
    """
    group_size = sum(rollout.tokens.shape[0] for rollout in rollouts) // len(informative)
    rows = chosen_rows(informative, wanted, group_size)
    rollout = _take_rows(rollouts, rows)
    return mask_rows(rollout, informative[rows // group_size]) if only_informative else rollout


def chosen_rows(informative: np.ndarray, wanted: int, group_size: int) -> np.ndarray:
    """Return which responses `choose_groups` takes, int [wanted · group_size], counted through all rollouts."""
    groups = np.argsort(~informative, kind="stable")[:wanted]
    return (groups[:, None] * group_size + np.arange(group_size)[None, :]).reshape(-1)


@jax.jit
def _take_rows(rollouts: list[RolloutBatch], rows: ArrayLike) -> RolloutBatch:
    def take_from(first: jax.Array, *others: jax.Array) -> jax.Array:
        leaf = jnp.concatenate([first, *others]) if others else first
        return constrain(leaf[rows], "rows", *(None,) * (leaf.ndim - 1))

    return jax.tree.map(take_from, *rollouts)


@jax.jit
def mask_rows(rollout: RolloutBatch, kept: ArrayLike) -> RolloutBatch:
    """Return the rollout without the tokens of some responses in its mask, so that they count in no mean.

    Args:
      rollout: B responses.
      kept: bool [B]; False for the responses to leave out.
    """
    return rollout._replace(mask=rollout.mask & jnp.asarray(kept)[:, None])
