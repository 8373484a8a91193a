"""Stochastic rounding to bfloat16: its mean and its neighbours against NumPy, and what it must leave as it is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rspo_jax.training import OptimizerConfig, init_train_state
from rspo_jax.training.rounding import round_like, widen

round_bfloat16 = jax.jit(lambda values, draw: round_like(values, jnp.zeros(values.shape, jnp.bfloat16), draw))


def neighbours(value):
    """The bfloat16 below and above a number, in magnitude, as float32."""
    bits = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)


def test_the_mean_of_many_roundings_is_the_number():
    count = 40_000
    for value in (1 + 2**-10, -(1 + 2**-10), 0.02 + 1e-6, -3e-5, 1.7e30, 2**-130):
        rounded = np.asarray(round_bfloat16(jnp.full(count, value, jnp.float32), 3), np.float32)
        low, high = neighbours(value)
        assert set(rounded) <= {low, high}
        share = (np.float64(np.float32(value)) - low) / (np.float64(high) - low)
        spread = np.sqrt(share * (1 - share) / count)
        assert np.mean(rounded == high) == pytest.approx(share, abs=5 * spread)


def test_what_bfloat16_holds_stays_as_it_is():
    held = np.array([0.0, -0.0, 1.0, -0.0078125, 3e38, 1e-40, np.inf, -np.inf, np.nan], ml_dtypes.bfloat16)
    for draw in range(5):
        rounded = np.asarray(round_bfloat16(held.astype(np.float32), draw))
        assert rounded.dtype == held.dtype and rounded.tobytes() == held.tobytes()
    # A NaN whose bits would run over is still one.
    assert np.isnan(
        np.asarray(round_bfloat16(np.full(64, 0x7FFFFFFF, np.uint32).view(np.float32), 0), np.float32)
    ).all()


def test_random_numbers_follow_the_draw_and_differ_between_leaves():
    values = jnp.full(1000, 0.1)
    first, again, other = (np.asarray(round_bfloat16(values, draw)) for draw in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    left, right = round_like((values, values), (first, first), jnp.int32(1))
    assert np.asarray(left).tobytes() != np.asarray(right).tobytes()


def test_float32_and_counts_add_nothing_to_a_program():
    tree = {"params": jnp.ones(3), "count": jnp.int32(2), "wide": jnp.ones(2)}
    program = jax.make_jaxpr(lambda tree: round_like(widen(tree), tree, jnp.int32(0)))(tree)
    assert not program.eqns
    halves = widen({"half": jnp.ones(3, jnp.bfloat16), "count": jnp.int32(2)})
    assert (halves["half"].dtype, halves["count"].dtype) == (jnp.float32, jnp.int32)


def test_parameters_of_other_narrow_dtypes_are_refused():
    for dtype in (jnp.float16, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"trained in float32 or bfloat16, not in {jnp.dtype(dtype)}: cast them"):
            init_train_state({"weight": jnp.zeros(2, dtype)}, OptimizerConfig())
