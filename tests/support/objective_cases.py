"""The forms of every objective that the tests go through, and one way to run them. Each form is compiled once for the
whole suite. Knows the public functions of the objectives; what is right is for `oracles` to say."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from support import oracles

import rspo_jax

NAMES = list(oracles.DEFAULTS)
SHIFT = {"gamma_min": 0.8}
SHIFTED = [name for name in NAMES if "gamma_min" in oracles.DEFAULTS[name]]
"""All but GMPO, whose router-shift form is RSPO."""
DUAL = ("grpo", {"dual_clip": 1.5, "aggregation": "token_mean"})
PLAIN = [
    *[(name, {}) for name in NAMES if name != "rspo"],
    ("grpo", {"aggregation": "token_mean"}),
    DUAL,
    ("dr_grpo", {"constant_length": 11}),
    ("cispo", {"clip_low": 0.1, "clip_high": 4.0}),
]
WITH_SHIFT = [
    ("rspo", {"position": "pre_clip"}),
    ("rspo", {"position": "post_clip"}),
    ("rspo", {"position": "post_clip_literal"}),
    *[(name, SHIFT) for name in SHIFTED if name != "rspo"],
]
AS_MASK = [(name, SHIFT | {"gamma_use": "mask"}) for name in ("rspo", "grpo", "cispo", "gspo_token")]
CASES = [*PLAIN, *WITH_SHIFT, *AS_MASK]
SHAPE = (6, 7)


class Result(NamedTuple):
    """What a form makes of a batch, in NumPy."""

    loss: np.ndarray
    gradient: np.ndarray
    by_penalty: np.ndarray
    """The gradient by the penalty."""
    total: np.ndarray
    weight: np.ndarray


def case_id(value):
    if not isinstance(value, dict):
        return None
    return "-".join(str(option) for option in value.values()) or "default"


def make_config(name, settings):
    return rspo_jax.OBJECTIVES[name].config_type(**settings)


def pad(array):
    """All batches of the compiled form have one shape."""
    array = np.asarray(array)
    return np.pad(array, [(0, most - size) for size, most in zip(array.shape, SHAPE, strict=False)])


def function_of(name, config):
    """(log_probs, penalty, the other arrays) -> the loss, and its total and weight; to be differentiated."""

    def loss(log_probs, penalty, arrays):
        mean, _ = rspo_jax.OBJECTIVES[name].terms(log_probs, **arrays, config=config, penalty=penalty)
        return mean.reduce(), mean

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@functools.cache
def compiled(name, config):
    return jax.jit(function_of(name, config))


def _run(function, name, arrays, fit):
    rows, tokens = arrays["log_probs"].shape
    arrays = {"penalty": np.zeros((rows, tokens), np.float32)} | arrays
    arrays = {key: fit(value) for key, value in arrays.items() if value is not None}
    (loss, mean), gradients = function(arrays.pop("log_probs"), arrays.pop("penalty"), arrays)
    gradient, by_penalty = (np.asarray(leaf)[:rows, :tokens] for leaf in gradients)
    return Result(np.asarray(loss), gradient, by_penalty, np.asarray(mean.total), np.asarray(mean.weight))


def run(name, batch, settings=None, **overrides):
    """The compiled form on a batch, with other arrays in place of its own where given."""
    function = compiled(name, make_config(name, settings or {}))
    return _run(function, name, batch.arrays() | overrides, pad)


def run_eagerly(name, batch, settings=None, **overrides):
    """The same operation by operation, in the batch's own shape and dtypes."""
    function = function_of(name, make_config(name, settings or {}))
    return _run(function, name, batch.arrays() | overrides, jnp.asarray)


def assert_matches_oracle(result, name, batch, settings, penalty=None):
    """To float32's precision, relative to each number, with two exceptions. Where SAPO's gate is nearly shut, the error
    of w counts w times over in an exponent. CISPO adds up log-probabilities of both signs."""
    smallest = float(np.finfo(np.float32).tiny)
    gate = 1e-6 * oracles.token_shares(name, batch, **settings).max() if name == "sapo" else smallest
    sums = 1e-6 * np.abs(batch.log_probs[batch.mask]).max(initial=0) if name == "cispo" else smallest
    np.testing.assert_allclose(result.loss, oracles.loss(name, batch, penalty, **settings), rtol=1e-5, atol=sums)
    np.testing.assert_allclose(result.gradient, oracles.gradient(name, batch, **settings), rtol=1e-5, atol=gate)


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)
