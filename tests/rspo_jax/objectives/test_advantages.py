"""Advantages against float64 oracles, and the penalty for overlong responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

import rspo_jax
from rspo_jax.objectives import ADVANTAGES, overlong_penalty

ORACLES = {
    "group": oracles.group_advantages,
    "group_centred": lambda rewards: oracles.group_advantages(rewards, scale=False),
    "leave_one_out": oracles.leave_one_out_advantages,
    "batch": oracles.batch_advantages,
}
OF_GROUPS = [name for name in ORACLES if name != "batch"]


@jax.jit
def compiled(rewards):
    """Run all estimators, and the public function, in one program for each shape."""
    scaled, centred = (rspo_jax.group_advantages(rewards, scale=scale) for scale in (True, False))
    public = {"scaled": scaled, "centred": centred, "default": rspo_jax.group_advantages(rewards)}
    return public | {name: estimator(rewards) for name, estimator in ADVANTAGES.items()}


penalty_of = jax.jit(overlong_penalty, static_argnames=("max_tokens", "buffer"))


def advantages_of(name, rewards):
    return np.asarray(compiled(np.asarray(rewards, np.float32))[name])


def rewards_of(kind, shape=(5, 8)):
    """Return random rewards of 0 and 1 ("binary"), or normal ones."""
    rng = np.random.default_rng(0)
    if kind == "binary":
        return (rng.random(shape) < 0.5).astype(np.float32)
    return (3.0 * rng.normal(size=shape) + 2.0).astype(np.float32)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_estimator_matches_its_oracle(name):
    assert set(ORACLES) == set(ADVANTAGES) and ADVANTAGES[name].__doc__
    for shape in ((5, 8), (1, 2)):
        for kind in ("binary", "continuous"):
            rewards = rewards_of(kind, shape)
            advantages = advantages_of(name, rewards)
            assert advantages.shape == shape and advantages.dtype == np.float32
            np.testing.assert_allclose(advantages, ORACLES[name](rewards), rtol=1e-5, atol=1e-6)


def test_the_public_function_scales_by_default():
    rewards = rewards_of("continuous")
    for name, same in {"group": ("scaled", "default"), "group_centred": ("centred",)}.items():
        for other in same:
            np.testing.assert_array_equal(advantages_of(other, rewards), advantages_of(name, rewards))


def test_known_values():
    rewards = np.tile([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], (5, 1))
    # Unbiased standard deviation: sqrt((6 * 0.0625 + 2 * 0.5625) / 7).
    scaled = np.where(rewards, 0.75, -0.25) / np.sqrt(1.5 / 7)
    np.testing.assert_allclose(advantages_of("group", rewards), scaled, rtol=1e-5)
    np.testing.assert_array_equal(advantages_of("group_centred", rewards), np.where(rewards, 0.75, -0.25))


def test_epsilon_is_added_to_the_standard_deviation():
    expected = 1e-6 / (np.sqrt(2.0) * 1e-6 + 1e-6)
    np.testing.assert_allclose(advantages_of("group", [[0.0, 2e-6]]), [[-expected, expected]], rtol=1e-5)


def test_the_level_of_the_rewards_makes_no_difference():
    """In float32 the mean of large rewards rounds their differences away; they are exact before it is taken."""
    differences = np.array([[0, 0, 0, 1], [1, 0, 3, 2], [5, 5, 0, 5]], np.float32)
    for level, step in ((1e6, 1 / 16), (-1e6, 1 / 16), (2**23, 1.0), (2**30, 128.0), (-(2**30), 64.0), (1e-3, 2**-33)):
        rewards = np.float32(level) + np.float32(step) * differences
        exact = (rewards.astype(np.float64) - rewards[:, :1]) / step
        assert np.all(exact == differences - differences[:, :1])
        for name, oracle in ORACLES.items():
            expected = oracle(rewards.astype(np.float64))
            np.testing.assert_allclose(advantages_of(name, rewards), expected, rtol=1e-5, err_msg=f"{name} at {level}")


def test_rewards_of_zero_and_one_are_taken_as_they_are():
    """Bit for bit the plain formula in float32, for rewards whose lowest is 0."""
    rewards = rewards_of("binary", (50, 8))
    rewards[:, 0] = 0
    mean = jnp.mean(rewards, axis=1, keepdims=True)
    plain = jax.jit(lambda r: (r - mean) / (jnp.std(r, axis=1, ddof=1, keepdims=True) + 1e-6))(rewards)
    differing = np.ptp(rewards, axis=1) > 0
    np.testing.assert_array_equal(advantages_of("group", rewards)[differing], np.asarray(plain)[differing])


def test_equal_rewards_give_exactly_zero():
    """The float32 mean of equal numbers need not be that number; there must still be no signal."""
    values = np.array([0.0, 1.0, 0.1, 1 / 3, -0.7, 1234.567, 1e-8], np.float32)
    for group in (3, 48):
        rewards = np.repeat(values[:, None], group, axis=1)
        for name in OF_GROUPS:
            np.testing.assert_array_equal(advantages_of(name, rewards), np.zeros_like(rewards), name)
    for name in ADVANTAGES:
        for value in values:
            rewards = np.full((5, 8), value)
            np.testing.assert_array_equal(advantages_of(name, rewards), np.zeros_like(rewards), name)


def test_groups_do_not_influence_each_other():
    rewards = rewards_of("continuous")
    changed = rewards.copy()
    changed[2] = 1e6
    rest = np.array([0, 1, 3, 4])
    for name in OF_GROUPS:
        np.testing.assert_array_equal(advantages_of(name, rewards)[rest], advantages_of(name, changed)[rest])


def test_shift_and_scale_of_the_rewards():
    rewards = rewards_of("continuous")
    moved = advantages_of("group", 4.0 * rewards + 8.0)
    np.testing.assert_allclose(advantages_of("group", rewards), moved, rtol=1e-5, atol=1e-5)
    unscaled = advantages_of("group_centred", rewards)
    larger = advantages_of("group_centred", 4.0 * rewards)
    np.testing.assert_allclose(4.0 * unscaled, larger, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(unscaled.sum(axis=1), np.zeros(5), atol=1e-5)


def test_compiled_and_under_vmap():
    rewards = np.stack([rewards_of("continuous"), rewards_of("binary")])
    advantages = jax.jit(jax.vmap(rspo_jax.group_advantages))(rewards)
    for index in range(2):
        expected = oracles.group_advantages(rewards[index])
        np.testing.assert_allclose(advantages[index], expected, rtol=1e-5, atol=1e-6)


def test_the_batch_is_the_baseline_of_its_estimator():
    """A group without variance still learns something there, and nothing from its own group."""
    rewards = np.repeat([[1.0], [0.0], [0.0], [1.0], [0.5]], 8, axis=1).astype(np.float32)
    advantages = advantages_of("batch", rewards)
    assert np.all(np.sign(advantages) == np.sign(2 * rewards - 1))
    np.testing.assert_allclose(advantages, oracles.batch_advantages(rewards), rtol=1e-5, atol=1e-6)
    for name in OF_GROUPS:
        np.testing.assert_array_equal(advantages_of(name, rewards), np.zeros((5, 8)))


def test_leaving_one_out_is_a_baseline_that_the_response_has_no_part_in():
    rewards = rewards_of("continuous")
    plain = advantages_of("leave_one_out", rewards)
    rewards[0, 0] += 4.0
    np.testing.assert_allclose(advantages_of("leave_one_out", rewards)[0, 0] - plain[0, 0], 4.0, rtol=1e-6)


def test_bad_rewards_are_refused_and_groups_of_one_are_only_centred():
    for name, estimator in ADVANTAGES.items():
        for shape in ((), (8,), (2, 3, 4)):
            with pytest.raises(ValueError, match="rewards"):
                estimator(jnp.zeros(shape))
        if name != "group_centred":
            with pytest.raises(ValueError, match="of 1"):
                estimator(jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match="rewards"):
        rspo_jax.group_advantages(jnp.zeros(8), scale=True)
    rewards = jnp.asarray([[1.0], [0.25]])
    with pytest.raises(ValueError, match="group"):
        rspo_jax.group_advantages(rewards)
    np.testing.assert_array_equal(rspo_jax.group_advantages(rewards, scale=False), np.zeros((2, 1), np.float32))


# Overlong responses


def test_the_overlong_penalty_grows_over_the_buffer_and_stops_at_the_limit():
    lengths = np.array([[0, 1, 80, 81, 90], [95, 99, 100, 101, 1000]])
    penalty = penalty_of(lengths, max_tokens=100, buffer=20)
    assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(penalty, [[0, 0, 0, -0.05, -0.5], [-0.75, -0.95, -1, -1, -1]], rtol=1e-6)


def test_the_overlong_penalty_counts_tokens_and_not_characters():
    """A peer's defect: a short response in a vocabulary of long words was penalised for its characters."""
    responses = [["internationalisation"] * 8, ["a"] * 30]
    tokens = np.array([len(response) for response in responses])
    characters = np.array([len("".join(response)) for response in responses])
    np.testing.assert_allclose(penalty_of(tokens, 40, 20), [0.0, -0.5])
    assert penalty_of(characters, 40, 20)[0] == -1.0
    # Lengths cannot be text, nor a mean of anything.
    with pytest.raises(TypeError, match="whole numbers of tokens"):
        overlong_penalty(tokens / 2, 40, 20)


def test_a_buffer_that_does_not_fit_is_refused():
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match="buffer must lie between 1 and max_tokens, 100"):
            overlong_penalty(jnp.asarray([5]), 100, buffer)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_responses_that_do_not_count_are_as_if_they_were_not_there(name):
    """Against the oracle on what is left of each group (of the batch, for the estimator that compares all)."""
    estimator, rewards = jax.jit(ADVANTAGES[name]), rewards_of("continuous", (6, 5))
    valid = np.random.default_rng(1).random((6, 5)) < 0.6
    valid[0], valid[1], valid[2] = True, False, [False, True, False, False, False]
    spoiled = np.where(valid, rewards, 1e30).astype(np.float32)  # whatever stands there has no effect
    advantages = np.asarray(estimator(spoiled, valid=jnp.asarray(valid)))
    assert np.all(advantages[~valid] == 0) and np.isfinite(advantages).all()
    if name == "batch":
        np.testing.assert_allclose(advantages[valid], ORACLES[name](rewards[valid][None])[0], rtol=1e-5)
    for group, kept, found in zip(rewards, valid, advantages, strict=True):
        if name != "batch" and kept.sum() > 1:
            np.testing.assert_allclose(found[kept], ORACLES[name](group[kept][None])[0], rtol=1e-5, atol=1e-6)
    if name != "batch":  # nothing to compare with
        np.testing.assert_array_equal(advantages[1:3], np.zeros((2, 5)))
    # Where all of them count, nothing changes but the order in which the compiler divides.
    everything = np.asarray(estimator(rewards, valid=jnp.ones((6, 5), bool)))
    np.testing.assert_allclose(everything, estimator(rewards), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the shape of the rewards"):
        ADVANTAGES[name](rewards, valid=jnp.ones(6, bool))
