"""Stochastic rounding of bfloat16 parameters, and of the optimizer's moments that lie beside them.

bfloat16 keeps eight bits of a number: near 0.02 its neighbours are 1.2e-4 apart. AdamW at a learning rate of 1e-6 moves
a weight by some 1e-6, which rounding to the nearest throws away every time. Rounded up or down at random, with the
probabilities that make the mean exact, the moves add up. The optimizer computes in float32, and its state keeps its
bytes and its tree, where float32 masters would need more memory than float32 parameters do.

P. Zamirai, J. Zhang, C. R. Aberger, C. De Sa, "Revisiting BFloat16 Training", https://arxiv.org/abs/2010.06192,
compares it with rounding to the nearest. This library's own choice: moments too, because a second moment in bfloat16
stops falling where 1 − beta2 is below the 1/512 that a rounding can lose.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array

_HALF = 16
"""Bits of a float32 that a bfloat16 leaves out; the others are the same in both."""


def widen(tree: Any) -> Any:
    """Cast the bfloat16 leaves of a pytree to float32, and leave all others as they are."""
    return jax.tree.map(lambda leaf: at_least_float32(leaf) if leaf.dtype == jnp.bfloat16 else leaf, tree)


def round_like(tree: Any, like: Any, draw: Array) -> Any:
    """Round the leaves of a pytree to the dtypes of another: float32 to bfloat16 at random, others are there already.

    What bfloat16 can hold stays as it is, so that a frozen parameter does not move. Nothing is drawn, and nothing added
    to the program, where there is no bfloat16.

    Args:
      tree: arrays, computed from those of `like` after `widen`.
      like: arrays of the dtypes to return.
      draw: int32 scalar that decides the random numbers, such as the number of updates made.
    """
    leaves, structure = jax.tree.flatten(tree)

    def rounded(index: int, leaf: Array, dtype: Any) -> Array:
        if leaf.dtype == dtype:
            return leaf
        return _round(leaf, jax.random.fold_in(jax.random.fold_in(jax.random.key(0), draw), index))

    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return structure.unflatten([rounded(index, leaf, old.dtype) for index, (leaf, old) in enumerate(pairs)])


def _round(values: Array, key: Array) -> Array:
    # Added below the last bit that stays, a random number carries into it with the probability of what is cut off.
    noise = jax.random.bits(key, values.shape, "uint16").astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + noise
    upper = jax.lax.bitcast_convert_type((bits >> _HALF).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(values), upper, values.astype(jnp.bfloat16))
