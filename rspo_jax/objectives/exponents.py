"""The bounded exponential of ratios and of the KL estimator k3: e^x up to 20 nats, and its tangent beyond.

This library's own choice. So far outside of any trust region e^x is of no use as a number: at 89 nats it overflows
float32, and from some 40 nats on the square of its gradient does, so that every update on such a token is skipped for
good. A cap on x would have no gradient exactly where the policy has to be pulled back. The tangent pulls on, in the
right direction and with a bounded slope of e^20 ≈ 4.9e8: summed over a million tokens, each of which moves a parameter
by as much as 1e4, this is 5e18, whose square float32 still holds. Clipping by the global norm then sets the length of
the step.
"""

import math

import jax
import jax.numpy as jnp

from rspo_jax.types import Array

LARGEST_EXPONENT = 20.0
"""Nats from which on the exponential is a straight line."""
_SLOPE = math.exp(LARGEST_EXPONENT)


@jax.custom_jvp
def bounded_exp(x: Array) -> Array:
    """Return e^x, bit for bit, where x ≤ 20, and e^20 · (x − 19) beyond; NaN stays NaN."""
    return _exp_and_derivative(x)[0]


@jax.custom_jvp
def bounded_k3(x: Array) -> Array:
    """Return e^x − x − 1, bit for bit, where x ≤ 20, and its tangent there beyond; NaN stays NaN."""
    near, beyond = _split(x)
    return jnp.expm1(near) - near + (_SLOPE - 1) * beyond


# The derivative is e^min(x, 20). With rules of their own the gradients are one product, as without a bound, and so keep
# their bits; those of `where` would add a second one, and of an infinite branch NaN.
@bounded_exp.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    value, derivative = _exp_and_derivative(*primals)
    return value, tangents[0] * derivative


@bounded_k3.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (near, beyond), (tangent,) = _split(*primals), tangents
    excess = jnp.expm1(near)
    return excess - near + (_SLOPE - 1) * beyond, tangent * (excess + 1) - tangent


def _exp_and_derivative(x: Array) -> tuple[Array, Array]:
    near, beyond = _split(x)
    derivative = jnp.exp(near)
    return derivative + _SLOPE * beyond, derivative


def _split(x: Array) -> tuple[Array, Array]:
    """Return min(x, 20) and max(x − 20, 0), whose sum is x."""
    is_beyond, bound = x > LARGEST_EXPONENT, jnp.asarray(LARGEST_EXPONENT, x.dtype)
    return jnp.where(is_beyond, bound, x), jnp.where(is_beyond, x - bound, 0)
