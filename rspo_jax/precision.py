"""The one rule of precision: losses, softmaxes and routing are computed in float32, or in float64 where given it.

This file must never know what is being computed.
"""

import jax.numpy as jnp

from rspo_jax.types import Array


def at_least_float32(array: Array) -> Array:
    """float64 stays as it is, everything else becomes float32."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)
