"""Advantages against float64 oracles, and the penalty for overlong responses. Knows the public functions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

import rspo_jax
from rspo_jax.objectives import ADVANTAGES, overlong_penalty


def rewards_of(kind, shape=(5, 8)):
    rng = np.random.default_rng(0)
    if kind == "binary":
        return (rng.random(shape) < 0.5).astype(np.float32)
    return (3.0 * rng.normal(size=shape) + 2.0).astype(np.float32)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize("shape", [(5, 8), (1, 2)])
def test_matches_oracle(kind, scale, shape):
    rewards = rewards_of(kind, shape)
    advantages = rspo_jax.group_advantages(jnp.asarray(rewards), scale=scale)
    assert advantages.shape == shape and advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, oracles.group_advantages(rewards, scale), rtol=1e-5, atol=1e-6)


def test_scaling_is_the_default():
    rewards = jnp.asarray(rewards_of("continuous"))
    np.testing.assert_array_equal(rspo_jax.group_advantages(rewards), rspo_jax.group_advantages(rewards, scale=True))


def test_known_values():
    rewards = jnp.asarray([[0.0, 0.0, 0.0, 1.0]])
    # Unbiased standard deviation: sqrt((3 * 0.0625 + 0.5625) / 3) = 0.5.
    np.testing.assert_allclose(rspo_jax.group_advantages(rewards), [[-0.5, -0.5, -0.5, 1.5]], rtol=1e-5)
    np.testing.assert_array_equal(rspo_jax.group_advantages(rewards, scale=False), [[-0.25, -0.25, -0.25, 0.75]])


def test_epsilon_is_added_to_the_standard_deviation():
    rewards = np.array([[0.0, 2e-6]], np.float32)
    expected = 1e-6 / (np.sqrt(2.0) * 1e-6 + 1e-6)
    np.testing.assert_allclose(rspo_jax.group_advantages(jnp.asarray(rewards)), [[-expected, expected]], rtol=1e-5)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("group", [3, 48])
def test_equal_rewards_give_exactly_zero(group, scale):
    # The float32 mean of equal numbers need not be that number; there must still be no signal.
    values = np.array([0.0, 1.0, 0.1, 1 / 3, -0.7, 1234.567, 1e-8], np.float32)
    rewards = np.repeat(values[:, None], group, axis=1)
    advantages = rspo_jax.group_advantages(jnp.asarray(rewards), scale=scale)
    np.testing.assert_array_equal(advantages, np.zeros_like(rewards))


def test_groups_do_not_influence_each_other():
    rewards = rewards_of("continuous")
    changed = rewards.copy()
    changed[2] = 1e6
    plain, other = (np.asarray(rspo_jax.group_advantages(jnp.asarray(x))) for x in (rewards, changed))
    rest = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(plain[rest], other[rest])


def test_shift_and_scale_of_the_rewards():
    rewards = rewards_of("continuous")
    plain = rspo_jax.group_advantages(jnp.asarray(rewards))
    np.testing.assert_allclose(plain, rspo_jax.group_advantages(jnp.asarray(4.0 * rewards + 8.0)), rtol=1e-5, atol=1e-5)
    unscaled = np.asarray(rspo_jax.group_advantages(jnp.asarray(rewards), scale=False))
    larger = rspo_jax.group_advantages(jnp.asarray(4.0 * rewards), scale=False)
    np.testing.assert_allclose(4.0 * unscaled, larger, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(unscaled.sum(axis=1), np.zeros(5), atol=1e-5)


def test_compiled_and_under_vmap():
    rewards = np.stack([rewards_of("continuous"), rewards_of("binary")])
    advantages = jax.jit(jax.vmap(rspo_jax.group_advantages))(rewards)
    for index in range(2):
        expected = oracles.group_advantages(rewards[index])
        np.testing.assert_allclose(advantages[index], expected, rtol=1e-5, atol=1e-6)


def test_group_of_one_is_refused_when_scaled_and_zero_when_not():
    rewards = jnp.asarray([[1.0], [0.25]])
    with pytest.raises(ValueError, match="group"):
        rspo_jax.group_advantages(rewards)
    np.testing.assert_array_equal(rspo_jax.group_advantages(rewards, scale=False), np.zeros((2, 1), np.float32))


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 4)])
@pytest.mark.parametrize("scale", [True, False])
def test_rewards_of_wrong_rank_are_refused(shape, scale):
    with pytest.raises(ValueError, match="rewards"):
        rspo_jax.group_advantages(jnp.zeros(shape), scale=scale)


# The table


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("shape", [(5, 8), (1, 2)])
def test_every_estimator_matches_its_oracle(name, shape):
    expected = {
        "group": oracles.group_advantages,
        "group_centred": lambda rewards: oracles.group_advantages(rewards, scale=False),
        "leave_one_out": oracles.leave_one_out_advantages,
        "batch": oracles.batch_advantages,
    }
    assert set(expected) == set(ADVANTAGES) and ADVANTAGES[name].__doc__
    rewards = rewards_of("continuous", shape)
    advantages = ADVANTAGES[name](jnp.asarray(rewards))
    assert advantages.shape == shape and advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, expected[name](rewards), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_zero_by_every_estimator(name):
    rewards = np.full((5, 8), 1 / 3, np.float32)
    np.testing.assert_array_equal(ADVANTAGES[name](jnp.asarray(rewards)), np.zeros_like(rewards))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_bad_rewards_are_refused_by_every_estimator(name):
    with pytest.raises(ValueError, match="rewards"):
        ADVANTAGES[name](jnp.zeros(8))
    if name != "group_centred":
        with pytest.raises(ValueError, match="of 1"):
            ADVANTAGES[name](jnp.zeros((1, 1)))


def test_the_batch_is_the_baseline_of_its_estimator():
    # A group without variance still learns something there, and nothing from its own group.
    rewards = jnp.asarray([[1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(ADVANTAGES["batch"](rewards), [[0.8660239] * 2, [-0.8660239] * 2], rtol=1e-5)
    for name in ("group", "group_centred", "leave_one_out"):
        np.testing.assert_array_equal(ADVANTAGES[name](rewards), np.zeros((2, 2)))


def test_leaving_one_out_is_a_baseline_that_the_response_has_no_part_in():
    rewards = np.array([[1.0, 0.0, 0.0, 0.5]], np.float32)
    plain = np.asarray(ADVANTAGES["leave_one_out"](jnp.asarray(rewards)))
    rewards[0, 0] += 4.0
    raised = np.asarray(ADVANTAGES["leave_one_out"](jnp.asarray(rewards)))
    np.testing.assert_allclose(raised[0, 0] - plain[0, 0], 4.0, rtol=1e-6)


# Overlong responses


def test_the_overlong_penalty_grows_over_the_buffer_and_stops_at_the_limit():
    lengths = jnp.asarray([[0, 1, 80, 81, 90], [95, 99, 100, 101, 1000]])
    penalty = overlong_penalty(lengths, max_tokens=100, buffer=20)
    assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(penalty, [[0, 0, 0, -0.05, -0.5], [-0.75, -0.95, -1, -1, -1]], rtol=1e-6)


def test_the_overlong_penalty_counts_tokens_and_not_characters():
    """The defect of a peer: a short response in a vocabulary of long words was punished for its characters."""
    responses = [["internationalisation"] * 8, ["a"] * 30]
    tokens = jnp.asarray([len(response) for response in responses])
    characters = jnp.asarray([len("".join(response)) for response in responses])
    np.testing.assert_allclose(overlong_penalty(tokens, 40, 20), [0.0, -0.5])
    assert overlong_penalty(characters, 40, 20)[0] == -1.0
    # What is counted cannot be text, nor a mean of anything.
    with pytest.raises(TypeError, match="whole numbers of tokens"):
        overlong_penalty(tokens / 2, 40, 20)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(ValueError, match="buffer must lie between 1 and max_tokens, 100"):
        overlong_penalty(jnp.asarray([5]), 100, buffer)
