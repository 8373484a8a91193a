"""The choice of groups to learn from, against a plain walk over them."""

import jax.numpy as jnp
import numpy as np
import pytest

from rspo_jax.rollouts import choose_groups, is_informative
from rspo_jax.types import RolloutBatch

GROUP = 2


def rollout_of(first_row, rows):
    """A rollout whose tokens tell its rows apart."""
    numbers = np.arange(first_row, first_row + rows)
    tokens = jnp.asarray(np.repeat(numbers[:, None], 3, axis=1), jnp.int32)
    mask = jnp.ones((rows, 2), bool)
    zeros = jnp.zeros((rows, 2), jnp.float32)
    return RolloutBatch(tokens, jnp.ones_like(tokens), mask, zeros, jnp.asarray(numbers, jnp.float32))


def test_groups_with_different_rewards_are_informative():
    rewards = np.array([[0, 0, 0], [0, 1, 0], [0.5, 0.5, 0.5], [-1, -1, 0]], np.float32)
    np.testing.assert_array_equal(is_informative(rewards), [False, True, False, True])
    valid = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 1]], bool)
    np.testing.assert_array_equal(is_informative(rewards, valid), [False, False, False, True])


@pytest.mark.parametrize("wanted", [1, 3, 5])
@pytest.mark.parametrize("only_informative", [False, True])
def test_informative_groups_come_first_in_the_order_they_were_drawn(wanted, only_informative):
    informative = np.array([False, True, False, False, True])
    rollouts = [rollout_of(0, 6), rollout_of(6, 4)] if wanted < 5 else [rollout_of(0, 10)]
    chosen = choose_groups(rollouts, informative, wanted, only_informative)
    groups = [1, 4, 0, 2, 3][:wanted]
    rows = [GROUP * group + member for group in groups for member in range(GROUP)]
    np.testing.assert_array_equal(chosen.tokens[:, 0], rows)
    np.testing.assert_array_equal(chosen.advantages, rows)
    kept = [not only_informative or bool(informative[row // GROUP]) for row in rows]
    np.testing.assert_array_equal(np.asarray(chosen.mask).all(axis=1), kept)
    np.testing.assert_array_equal(np.asarray(chosen.mask).any(axis=1), kept)
