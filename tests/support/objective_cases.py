"""The forms of every objective that the tests go through, and one way to run them.

A form is a row of the table with settings for its config. All forms are compiled once for a whole test session, in one
program and one shape that all batches are padded to. `oracles` has the expected values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rspo_jax
from support import oracles

NAMES = list(oracles.DEFAULTS)
SHIFT = {"gamma_min": 0.8}
SHIFTED = [name for name in NAMES if "gamma_min" in oracles.DEFAULTS[name]]
"""All objectives but GMPO, whose form with a router shift is RSPO."""
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
"""The forms that the contract holds for."""
COMPILED = [
    *CASES,
    *[(name, SHIFT | {"gamma_use": "mask"}) for name in ("gspo", "sapo")],
    *[("grpo", {"clip_low": clip_low, "gamma_min": 1 - clip_low}) for clip_low in (0.2, 0.64)],
]
"""The forms of the program that all tests share."""
SHAPE = (6, 7)
"""The shape [B, T] that every compiled form has."""


class Result(NamedTuple):
    """The outputs of a form on one batch, in NumPy."""

    loss: np.ndarray
    gradient: np.ndarray
    """The gradient with respect to the log-probabilities."""
    by_penalty: np.ndarray
    """The gradient with respect to the penalty."""
    total: np.ndarray
    weight: np.ndarray


def case_id(value):
    """Return the id of a form's settings, for pytest."""
    if not isinstance(value, dict):
        return None
    return "-".join(str(option) for option in value.values()) or "default"


def make_config(name, settings):
    """Return an objective's config with some of its defaults changed."""
    return rspo_jax.OBJECTIVES[name].config_type(**settings)


def pad(array):
    """Return an array [B] or [B, T], padded with zeros to the shape of the compiled forms."""
    array = np.asarray(array)
    return np.pad(array, [(0, most - size) for size, most in zip(array.shape, SHAPE, strict=False)])


def padded(batch):
    """Return a batch in the shape of the compiled forms, so that a constant length is the same for the oracle."""
    return batch.replace(**{key: pad(array) for key, array in batch.arrays().items()})


def function_of(name, config):
    """Return the form as a function of log-probabilities, penalty and a dict of the other arrays.

    It returns the loss and its mean before the division, and the gradients with respect to the first two arguments.
    """

    def loss(log_probs, penalty, arrays):
        mean, _ = rspo_jax.OBJECTIVES[name].terms(log_probs, **arrays, config=config, penalty=penalty)
        return mean.reduce(), mean

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@jax.jit
def _all_forms(*arguments):
    """Run every form of `COMPILED`: one program compiles in a quarter of the time that one program a form takes."""
    return [function_of(name, make_config(name, settings))(*arguments) for name, settings in COMPILED]


@functools.cache
def _one_form(name, config):
    return jax.jit(function_of(name, config))


@functools.cache
def _place(name, config):
    """Return the place of a form in `COMPILED`, None for another form."""
    return next((at for at, case in enumerate(COMPILED) if (case[0], make_config(*case)) == (name, config)), None)


_outputs = {}
"""The outputs of all forms by the bytes of the arguments: most tests give every form the same batches."""


def run(name, batch, settings=None, **overrides):
    """Run the compiled form on a batch, with other arrays in place of its own where given."""
    config, arrays = make_config(name, settings or {}), batch.arrays() | overrides
    rows, tokens = arrays["log_probs"].shape
    arguments = _arguments(arrays, pad)
    place = _place(name, config)
    if place is None:
        return _result(jax.device_get(_one_form(name, config)(*arguments)), rows, tokens)
    leaves, structure = jax.tree.flatten(arguments)
    key = structure, *((leaf.dtype, leaf.tobytes()) for leaf in leaves)
    if key not in _outputs:
        _outputs[key] = jax.device_get(_all_forms(*arguments))
    return _result(_outputs[key][place], rows, tokens)


def run_eagerly(name, batch, settings=None, **overrides):
    """Run the form operation by operation, in the batch's own shape and dtypes."""
    arrays = batch.arrays() | overrides
    outputs = function_of(name, make_config(name, settings or {}))(*_arguments(arrays, jnp.asarray))
    return _result(jax.device_get(outputs), *arrays["log_probs"].shape)


def _arguments(arrays, fit):
    """Return log-probabilities, penalty and the dict of the other arrays, without those that are None."""
    arrays = {"penalty": np.zeros(arrays["log_probs"].shape, np.float32)} | arrays
    arrays = {key: fit(value) for key, value in arrays.items() if value is not None}
    return arrays.pop("log_probs"), arrays.pop("penalty"), arrays


def _result(outputs, rows, tokens):
    (loss, mean), gradients = outputs
    gradient, by_penalty = (leaf[:rows, :tokens] for leaf in gradients)
    return Result(*map(np.asarray, (loss, gradient, by_penalty, mean.total, mean.weight)))


def assert_matches_oracle(result, name, batch, settings, penalty=None):
    """Compare loss and gradient with the oracles, to float32's precision relative to each number.

    There are two exceptions. Where SAPO's gate is nearly shut, the error of w enters an exponent w times over. CISPO
    adds up log-probabilities of both signs.
    """
    smallest = float(np.finfo(np.float32).tiny)
    gate = 1e-6 * oracles.token_shares(name, batch, **settings).max() if name == "sapo" else smallest
    sums = 1e-6 * np.abs(batch.log_probs[batch.mask]).max(initial=0) if name == "cispo" else smallest
    np.testing.assert_allclose(result.loss, oracles.loss(name, batch, penalty, **settings), rtol=1e-5, atol=sums)
    np.testing.assert_allclose(result.gradient, oracles.gradient(name, batch, **settings), rtol=1e-5, atol=gate)


def assert_same_bits(left, right):
    """Compare two pytrees of arrays, bit for bit and in shape and dtype."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)
