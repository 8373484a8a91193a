"""Rows sorted by group, cut into runs of a single group: the pieces that a grouped product multiplies one by one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class RowBlocks(NamedTuple):
    """Runs of at most `block_size` rows of one group, in the order of the rows."""

    start: Array
    """int32 [blocks]: the first row of each."""
    end: Array
    """int32 [blocks]: one beyond the last row of each; at most `start` in blocks that are not used."""
    group: Array
    """int32 [blocks]: the group of each."""
    num_used: Array
    """int32 scalar: number of blocks that hold rows; the later ones are empty."""


def cut_rows(group_sizes: Array, num_rows: int, block_size: int) -> RowBlocks:
    """Cut the rows of all groups into blocks, as many as the most uneven group sizes may need.

    Args:
      group_sizes: int32 [E], not negative, with a sum of at most `num_rows`.
      num_rows: rows of the array.
      block_size: rows of a full block.
    """
    num_groups = group_sizes.size
    num_blocks = num_rows // block_size + min(num_groups, num_rows)
    last_block = jnp.cumsum(-(-group_sizes // block_size), dtype=jnp.int32)
    group_end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    group = jnp.searchsorted(last_block, block, side="right").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    # Counted from the group's end, so that the position needs no second cumulative sum.
    blocks_left = last_block[group] - block
    size = group_sizes[group]
    start = group_end[group] - size + (-(-size // block_size) - blocks_left) * block_size
    return RowBlocks(start, jnp.minimum(start + block_size, group_end[group]), group, last_block[-1])
