"""Token log-probabilities and entropy from logits against float64 oracles.

Logits share a shape, so that each operation is compiled once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles

import rspo_jax

B, T, V = 2, 3, 11


def random_logits(seed=0, scale=3.0):
    return (scale * np.random.default_rng(seed).normal(size=(B, T, V))).astype(np.float32)


def random_targets(seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


def expected_log_probs(logits, targets, temperature=1.0):
    log_p = oracles.log_softmax(np.asarray(logits, np.float64) / temperature)
    return np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def expected_entropy(logits, temperature=1.0):
    log_p = oracles.log_softmax(np.asarray(logits, np.float64) / temperature)
    return -(np.exp(log_p) * log_p).sum(axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_match_oracle(temperature):
    logits, targets = random_logits(), random_targets()
    log_probs = rspo_jax.token_log_probs(jnp.asarray(logits), jnp.asarray(targets), temperature=temperature)
    assert log_probs.shape == (B, T) and log_probs.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected_log_probs(logits, targets, temperature), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_entropy_matches_oracle(temperature):
    logits = random_logits(seed=1)
    entropy = rspo_jax.token_entropy(jnp.asarray(logits), temperature=temperature)
    assert entropy.shape == (B, T) and entropy.dtype == jnp.float32
    np.testing.assert_allclose(entropy, expected_entropy(logits, temperature), rtol=1e-5, atol=1e-6)


def test_default_temperature_is_one():
    logits, targets = jnp.asarray(random_logits()), jnp.asarray(random_targets())
    np.testing.assert_array_equal(
        rspo_jax.token_log_probs(logits, targets),
        rspo_jax.token_log_probs(logits, targets, temperature=1.0),
    )
    np.testing.assert_array_equal(rspo_jax.token_entropy(logits), rspo_jax.token_entropy(logits, temperature=1.0))


def test_compiled_and_under_vmap():
    logits = np.stack([random_logits(seed) for seed in range(2)])
    targets = np.stack([random_targets(seed) for seed in range(2)])
    log_probs = jax.jit(jax.vmap(rspo_jax.token_log_probs))(logits, targets)
    entropy = jax.jit(jax.vmap(rspo_jax.token_entropy))(logits)
    for index in range(2):
        np.testing.assert_allclose(
            log_probs[index],
            expected_log_probs(logits[index], targets[index]),
            rtol=1e-5,
            atol=1e-6,
        )
        np.testing.assert_allclose(entropy[index], expected_entropy(logits[index]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gradient_is_one_hot_minus_probabilities_over_temperature(temperature):
    logits, targets = random_logits(seed=2), random_targets(seed=2)

    def total(logits):
        return rspo_jax.token_log_probs(logits, jnp.asarray(targets), temperature=temperature).sum()

    gradient = jax.jit(jax.grad(total))(logits)
    probabilities = np.exp(oracles.log_softmax(logits.astype(np.float64) / temperature))
    expected = (np.eye(V)[targets] - probabilities) / temperature
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_computed_in_float32():
    logits = random_logits(seed=3).astype(jnp.bfloat16)
    targets = random_targets(seed=3)
    exact = logits.astype(np.float32)
    logits = jnp.asarray(logits)
    log_probs = rspo_jax.token_log_probs(logits, jnp.asarray(targets), temperature=0.7)
    entropy = rspo_jax.token_entropy(logits, temperature=0.7)
    assert log_probs.dtype == jnp.float32 and entropy.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, expected_log_probs(exact, targets, 0.7), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, expected_entropy(exact, 0.7), rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite_and_exact():
    logits = np.full((B, T, V), -1e4, np.float32)
    logits[0, 0, :3] = [1e4, 0.0, 0.0]
    logits[0, 2, :2] = 1e4
    for target in range(4):
        targets = np.full((B, T), target, np.int32)
        log_probs = rspo_jax.token_log_probs(jnp.asarray(logits), jnp.asarray(targets))
        np.testing.assert_allclose(log_probs, expected_log_probs(logits, targets), rtol=1e-6)
    entropy = np.asarray(rspo_jax.token_entropy(jnp.asarray(logits)))
    np.testing.assert_allclose(entropy[0], [0.0, np.log(V), np.log(2.0)], rtol=1e-6, atol=1e-6)


def test_entropy_is_between_zero_and_that_of_the_uniform_distribution():
    uniform = np.asarray(rspo_jax.token_entropy(jnp.asarray(np.full((B, T, V), 3.0, np.float32))))
    np.testing.assert_allclose(uniform, np.full((B, T), np.log(V)), rtol=1e-6)
    for scale in (0.1, 1.0, 30.0):
        entropy = np.asarray(rspo_jax.token_entropy(jnp.asarray(random_logits(seed=4, scale=scale))))
        assert np.all((entropy >= 0) & (entropy <= np.log(V) + 1e-6))


def test_constant_added_to_the_logits_changes_nothing():
    logits, targets = random_logits(seed=5), jnp.asarray(random_targets(seed=5))
    on_grid = np.round(logits * 64) / 64
    moved = jnp.asarray(on_grid + np.float32(16.0))
    on_grid = jnp.asarray(on_grid)
    for score in (lambda logits: rspo_jax.token_log_probs(logits, targets), rspo_jax.token_entropy):
        np.testing.assert_allclose(np.asarray(score(on_grid)), np.asarray(score(moved)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    logits, targets = jnp.asarray(random_logits()), jnp.asarray(random_targets())
    with pytest.raises(ValueError, match="temperature"):
        rspo_jax.token_log_probs(logits, targets, temperature=temperature)
    with pytest.raises(ValueError, match="temperature"):
        rspo_jax.token_entropy(logits, temperature=temperature)


@pytest.mark.parametrize(
    "targets", [np.zeros((B, T + 1), np.int32), np.zeros(T, np.int32), np.zeros((B, T), np.float32)]
)
def test_bad_targets_are_refused(targets):
    with pytest.raises((ValueError, TypeError), match="targets"):
        jax.eval_shape(rspo_jax.token_log_probs, random_logits(), targets)


@pytest.mark.parametrize("shape", [(V,), (T, V), (1, B, T, V), (B, T)])
def test_logits_that_do_not_fit_the_targets_are_refused(shape):
    with pytest.raises(ValueError, match="logits"):
        jax.eval_shape(rspo_jax.token_log_probs, jax.ShapeDtypeStruct(shape, jnp.float32), random_targets())
