"""Runs each token through its chosen experts, and through no others.

Assignments (token, expert) are grouped by expert into blocks of equal size, and one loop visits the blocks that are in
use: dropless, with static shapes, and with at most one partly filled block an expert. Memory holds one block's
intermediate activations at a time; the backward pass computes them again. Pure functions of arrays: this file must
never know a router, a model or its configuration.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class BlockLayout(NamedTuple):
    """Where each assignment lives in a buffer of `blocks × block_size` rows. Assignment n·K + k is token n's k-th."""

    row_of_assignment: Array
    """int32 [N·K]."""
    assignment_of_row: Array
    """int32 [blocks, block_size]; N·K marks a row without one."""
    expert_of_block: Array
    """int32 [blocks]."""
    num_used: Array
    """int32 scalar: blocks beyond it are empty."""


def block_size_for(num_assignments: int, num_experts: int) -> int:
    """A power of two such that an expert has about four blocks: few enough to be fast, small enough to waste little."""
    per_expert = max(1, num_assignments // num_experts)
    return min(256, max(8, 1 << (per_expert // 4).bit_length()))


def block_layout(expert_ids: Array, num_experts: int, block_size: int) -> BlockLayout:
    """Groups assignments by expert.

    Args:
      expert_ids: int [N, K], each in [0, num_experts).
      num_experts: E.
      block_size: rows of a block.
    """
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    num_assignments = flat.size
    num_blocks = num_assignments // block_size + min(num_experts, num_assignments)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_experts = flat[order]
    group_start = jnp.searchsorted(sorted_experts, jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    last_block = jnp.cumsum(-(-jnp.diff(group_start) // block_size))
    first_row = jnp.concatenate([jnp.zeros(1, jnp.int32), last_block[:-1]]) * block_size
    rank = jnp.arange(num_assignments, dtype=jnp.int32) - group_start[sorted_experts]
    row = first_row[sorted_experts] + rank
    empty = jnp.full(num_blocks * block_size, num_assignments, jnp.int32)
    block = jnp.searchsorted(last_block, jnp.arange(num_blocks, dtype=jnp.int32), side="right").astype(jnp.int32)
    return BlockLayout(
        row_of_assignment=jnp.zeros_like(flat).at[order].set(row, unique_indices=True),
        assignment_of_row=empty.at[row].set(order, unique_indices=True).reshape(num_blocks, block_size),
        expert_of_block=jnp.minimum(block, num_experts - 1),
        num_used=last_block[-1],
    )


def run_experts(x: Array, weights: Array, expert_ids: Array, gate_up: Array, down: Array) -> Array:
    """Σ_k weights[n, k] · SwiGLU expert `expert_ids[n, k]` of x[n].

    Args:
      x: float [N, D].
      weights: float [N, K], the combine weights, in the dtype of x.
      expert_ids: int [N, K].
      gate_up: float [E, D, 2, F], gate and up projections, in the dtype of x.
      down: float [E, F, D].

    Returns:
      float [N, D] in the dtype of x. Differentiable (reverse mode) in x, weights and both projections.
    """
    block_size = block_size_for(expert_ids.size, gate_up.shape[0])
    layout = block_layout(expert_ids, gate_up.shape[0], block_size)
    return _run_blocks(x, weights, gate_up, down, layout)


def _expert(x: Array, weights: Array, gate_up: Array, down: Array) -> Array:
    """One expert on one block: [rows, D], [rows], [D, 2, F], [F, D] -> [rows, D].

    The combine weight multiplies before the last product, so that its gradient needs no expert output.
    """
    hidden_size, _, expert_size = gate_up.shape
    gate, up = jnp.split(x @ gate_up.reshape(hidden_size, 2 * expert_size), 2, axis=-1)
    return (jax.nn.silu(gate) * up * weights[:, None]) @ down


def _block_inputs(x: Array, weights: Array, layout: BlockLayout, block: Array) -> tuple[Array, Array, Array]:
    """The tokens, their rows of x and their weights in one block; rows without an assignment get weight 0."""
    assignments = layout.assignment_of_row[block]
    filled = assignments < weights.size
    assignments = jnp.where(filled, assignments, 0)
    tokens = assignments // weights.shape[1]
    return tokens, x[tokens], jnp.where(filled, weights.reshape(-1)[assignments], 0)


@jax.custom_vjp
def _run_blocks(x: Array, weights: Array, gate_up: Array, down: Array, layout: BlockLayout) -> Array:
    def body(block: Array, rows: Array) -> Array:
        _, block_x, block_weights = _block_inputs(x, weights, layout, block)
        expert = layout.expert_of_block[block]
        return rows.at[block].set(_expert(block_x, block_weights, gate_up[expert], down[expert]))

    rows = jnp.zeros((*layout.assignment_of_row.shape, x.shape[-1]), x.dtype)
    rows = jax.lax.fori_loop(0, layout.num_used, body, rows)
    return _sum_over_assignments(rows, layout, weights.shape)


def _sum_over_assignments(rows: Array, layout: BlockLayout, shape: tuple[int, ...]) -> Array:
    by_assignment = rows.reshape(-1, rows.shape[-1])[layout.row_of_assignment]
    return jnp.sum(by_assignment.reshape(*shape, -1), axis=1)


def _forward(x: Array, weights: Array, gate_up: Array, down: Array, layout: BlockLayout) -> tuple[Array, tuple]:
    return _run_blocks(x, weights, gate_up, down, layout), (x, weights, gate_up, down, layout)


def _backward(residuals: tuple, output_gradient: Array) -> tuple:
    x, weights, gate_up, down, layout = residuals

    def body(block: Array, gradients: tuple) -> tuple:
        x_rows, weight_rows, gate_up_sum, down_sum = gradients
        tokens, block_x, block_weights = _block_inputs(x, weights, layout, block)
        expert = layout.expert_of_block[block]
        _, vjp = jax.vjp(_expert, block_x, block_weights, gate_up[expert], down[expert])
        x_part, weight_part, gate_up_part, down_part = vjp(output_gradient[tokens])
        return (
            x_rows.at[block].set(x_part),
            weight_rows.at[block].set(weight_part),
            gate_up_sum.at[expert].add(gate_up_part.astype(jnp.float32)),
            down_sum.at[expert].add(down_part.astype(jnp.float32)),
        )

    shape = layout.assignment_of_row.shape
    start = (
        jnp.zeros((*shape, x.shape[-1]), x.dtype),
        jnp.zeros(shape, weights.dtype),
        jnp.zeros(gate_up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
    )
    x_rows, weight_rows, gate_up_sum, down_sum = jax.lax.fori_loop(0, layout.num_used, body, start)
    return (
        _sum_over_assignments(x_rows, layout, weights.shape),
        weight_rows.reshape(-1)[layout.row_of_assignment].reshape(weights.shape),
        gate_up_sum.astype(gate_up.dtype),
        down_sum.astype(down.dtype),
        None,
    )


_run_blocks.defvjp(_forward, _backward)
