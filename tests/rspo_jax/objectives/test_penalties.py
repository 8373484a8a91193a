"""KL penalties and the entropy bonus: values by hand, and expected gradients, exact over a small vocabulary."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.objective_cases import run

from rspo_jax import RegularizerConfig, entropy_penalty, kl_penalty, token_entropy, token_penalty
from rspo_jax.objectives.penalties import KLEstimator

V = 5
ESTIMATORS = typing.get_args(KLEstimator)
RNG = np.random.default_rng(0)
LOGITS, REFERENCE_LOGITS = (RNG.normal(size=V) for _ in range(2))


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum()


def kl(p, q):
    return float(np.sum(p * np.log(p / q)))


def difference(function, at, step=1e-6):
    """Return the derivative of a float64 function of a vector."""
    return np.array([(function(at + s) - function(at - s)) / (2 * step) for s in step * np.eye(len(at))])


def test_values_are_those_of_the_formulas():
    log_probs, reference = (np.log(probabilities(x)).astype(np.float32)[None] for x in (LOGITS, REFERENCE_LOGITS))
    mask = np.array([[True, True, False, True, True]])

    @jax.jit
    def penalties(*arrays):
        return {estimator: kl_penalty(*arrays, estimator) for estimator in ESTIMATORS}

    x = reference.astype(np.float64) - log_probs
    formulas = {"k1": -x, "k2": x**2 / 2, "k3": np.exp(x) - x - 1}
    p, q = probabilities(LOGITS), probabilities(REFERENCE_LOGITS)
    for estimator, values in penalties(log_probs, reference, mask).items():
        np.testing.assert_allclose(values, np.where(mask, formulas[estimator], 0), rtol=1e-5, atol=1e-7)
        if estimator != "k2":
            assert np.sum(p * formulas[estimator]) == pytest.approx(kl(p, q), rel=1e-6)


def test_the_gradients_in_expectation():
    """The mean, over the policy's own tokens, of the gradient that each of them gives to the logits."""
    reference = jax.nn.log_softmax(jnp.asarray(REFERENCE_LOGITS, jnp.float32))[None]

    def loss(logits, weights, estimator):
        log_probs = jax.nn.log_softmax(logits)[None]
        return jnp.sum(weights * kl_penalty(log_probs, reference, jnp.ones((1, V), bool), estimator)[0])

    @jax.jit
    def gradients(logits, weights):
        return {estimator: jax.grad(loss)(logits, weights, estimator) for estimator in ESTIMATORS}

    found = gradients(LOGITS.astype(np.float32), probabilities(LOGITS).astype(np.float32))
    q = probabilities(REFERENCE_LOGITS)
    reverse = difference(lambda logits: kl(probabilities(logits), q), LOGITS)
    forward = difference(lambda logits: kl(q, probabilities(logits)), LOGITS)
    np.testing.assert_allclose(found["k2"], reverse, atol=1e-6)
    np.testing.assert_allclose(found["k3"], forward, atol=1e-6)
    # The value of k1 is the unbiased one, but as a loss it pulls towards nothing.
    np.testing.assert_allclose(found["k1"], 0, atol=1e-6)
    assert np.abs(reverse).min() > 1e-3 and not np.allclose(reverse, forward, atol=1e-2)


def test_the_entropy_bonus_and_its_gradient():
    def negative_entropy(logits):
        p = probabilities(logits)
        return float(np.sum(p * np.log(p)))

    @jax.jit
    @jax.value_and_grad
    def penalty(logits):
        return entropy_penalty(token_entropy(logits[None, None]), jnp.ones((1, 1), bool))[0, 0]

    value, gradient = penalty(LOGITS.astype(np.float32))
    assert value == pytest.approx(negative_entropy(LOGITS), rel=1e-6)
    np.testing.assert_allclose(gradient, difference(negative_entropy, LOGITS), atol=1e-6)


def test_padding_and_the_reference_have_no_gradient():
    mask = np.array([[True, False]])
    config = RegularizerConfig(kl_coefficient=0.1, entropy_coefficient=0.2)

    def loss(log_probs, entropy, reference):
        penalty, _ = token_penalty(config, log_probs, entropy, jnp.asarray(mask), reference)
        return jnp.sum(penalty)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    for garbage in (np.nan, np.inf, -np.inf):
        arrays = (np.array([[value, garbage]], np.float32) for value in (-1.0, 2.0, -1.5))
        by_log_probs, by_entropy, by_reference = gradients(*arrays)
        np.testing.assert_allclose(by_log_probs, [[0.1 * (1 - np.exp(-0.5)), 0]], rtol=1e-6)
        np.testing.assert_allclose(by_entropy, [[-0.2, 0]], rtol=1e-6)
        np.testing.assert_array_equal(by_reference, 0)


def test_the_sum_of_both_reaches_an_objective_by_its_penalty():
    config = RegularizerConfig(kl_coefficient=0.1, kl_estimator="k2", entropy_coefficient=0.2)
    batch = oracles.random_batch(4, 0.3)
    reference, entropy = (RNG.uniform(*span, (6, 7)).astype(np.float32) for span in ((-3, -1), (0, 2)))
    arrays = (jnp.asarray(array) for array in (batch.log_probs, entropy, batch.mask, reference))
    penalty, statistics = token_penalty(config, *arrays)
    x = reference - batch.log_probs
    expected = 0.1 * x**2 / 2 - 0.2 * entropy
    np.testing.assert_allclose(np.asarray(penalty)[batch.mask], expected[batch.mask], rtol=1e-5)
    assert list(statistics) == ["reference_kl"]
    np.testing.assert_allclose(statistics["reference_kl"].reduce(), np.mean((x**2 / 2)[batch.mask]), rtol=1e-5)
    added = run("dapo", batch, penalty=penalty).total - run("dapo", batch).total
    np.testing.assert_allclose(added, expected[batch.mask].sum(), rtol=1e-5)


def test_nothing_is_added_by_default():
    log_probs, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    assert token_penalty(RegularizerConfig(), log_probs, log_probs, mask) == (None, {})
    assert not RegularizerConfig(entropy_coefficient=1.0).needs_reference
    assert not RegularizerConfig(kl_coefficient=1.0, entropy_coefficient=1.0).needs_routers
    for name in ("load_balance_coefficient", "router_z_coefficient"):
        assert RegularizerConfig(**{name: 0.1}).needs_routers


def test_mistakes_are_named():
    log_probs, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    for changes, message in [
        ({"kl_coefficient": -0.1}, "kl_coefficient must be 0 or more, got -0.1"),
        ({"entropy_coefficient": float("nan")}, "entropy_coefficient must be 0 or more"),
        ({"load_balance_coefficient": -1}, "load_balance_coefficient must be 0 or more, got -1"),
        ({"router_z_coefficient": -1}, "router_z_coefficient must be 0 or more, got -1"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3; got 'k4'"),
    ]:
        with pytest.raises(ValueError, match=message):
            RegularizerConfig(**changes)
    with pytest.raises(ValueError, match="kl_estimator must be one of"):
        kl_penalty(log_probs, log_probs, mask, "k4")
    with pytest.raises(ValueError, match="needs reference_log_probs"):
        token_penalty(RegularizerConfig(kl_coefficient=0.1), log_probs, log_probs, mask)
    with pytest.raises(ValueError, match=r"reference_log_probs must have the shape of log_probs, \(2, 3\)"):
        kl_penalty(log_probs, jnp.zeros((2, 4)), mask)
    with pytest.raises(ValueError, match="mask must have the shape of entropy"):
        entropy_penalty(log_probs, mask[:1])
