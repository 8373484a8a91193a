"""Runs each token through its chosen experts, and through no others.

Dropless, with static shapes, in one of two ways that `run_experts` chooses when the program is lowered. On TPUs and
GPUs the assignments (token, expert) are sorted by expert and go through two grouped products. On the CPU the sorted
assignments are cut into blocks of one expert, and a loop takes each block from its tokens to its output: there the
wide intermediate activations of a block stay in the processor's cache, where two grouped products would write and read
them whole, which costs more than computing them again in the backward pass. Pure functions of arrays: this file must
never know a router, a model or its configuration.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.grouped_matmul import block_size_for, grouped_matmul

Array = jax.Array


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
    arguments = (x, weights, expert_ids, gate_up, down)
    return jax.lax.platform_dependent(*arguments, cpu=run_experts_in_blocks, default=run_experts_sorted)


def run_experts_of_layer(
    x: Array, weights: Array, expert_ids: Array, gate_up: Array, down: Array, layer: Array
) -> Array:
    """`run_experts` with the projections of one layer of a stack, without gradient, for decoding.

    A few tokens touch few weights: on the CPU only those of the experts in use are read, from where they lie in the
    stack, while a slice of the whole layer would copy them all at every step.

    Args:
      x: float [N, D].
      weights: float [N, K].
      expert_ids: int [N, K].
      gate_up: float [L, E, D, 2, F], in any floating dtype; products are in that of x.
      down: float [L, E, F, D].
      layer: int32 scalar.

    Returns:
      float [N, D] in the dtype of x.
    """
    arguments = (x, weights, expert_ids, gate_up, down, layer)
    return jax.lax.platform_dependent(*arguments, cpu=_run_blocks_of_layer, default=_run_sorted_layer)


def _run_blocks_of_layer(
    x: Array, weights: Array, expert_ids: Array, gate_up: Array, down: Array, layer: Array
) -> Array:
    route = sort_assignments(expert_ids, gate_up.shape[1])

    def parameters_of(expert: Array) -> tuple[Array, Array]:
        return gate_up[layer, expert].astype(x.dtype), down[layer, expert].astype(x.dtype)

    return _multiply_blocks(x, weights, route, parameters_of)


def _run_sorted_layer(x: Array, weights: Array, expert_ids: Array, gate_up: Array, down: Array, layer: Array) -> Array:
    return run_experts_sorted(x, weights, expert_ids, gate_up[layer].astype(x.dtype), down[layer].astype(x.dtype))


class SortedAssignments(NamedTuple):
    """The assignments in the order of their experts, one a row. Assignment n·K + k is token n's k-th."""

    assignment_of_row: Array
    """int32 [N·K]."""
    row_of_assignment: Array
    """int32 [N·K]: the inverse."""
    group_bounds: Array
    """int32 [E + 1]: rows group_bounds[e] to group_bounds[e + 1] are expert e's."""


def sort_assignments(expert_ids: Array, num_experts: int) -> SortedAssignments:
    """expert_ids: int [N, K], each in [0, num_experts)."""
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    return SortedAssignments(order, jnp.zeros_like(flat).at[order].set(rows, unique_indices=True), group_bounds)


def run_experts_sorted(x: Array, weights: Array, expert_ids: Array, gate_up: Array, down: Array) -> Array:
    """`run_experts` by two grouped products over the assignments in the order of their experts."""
    num_experts, hidden_size, _, expert_size = gate_up.shape
    route = sort_assignments(expert_ids, num_experts)
    group_sizes = jnp.diff(route.group_bounds)
    rows = _rows_of_tokens(x, route, weights.shape)
    row_weights = _rows_of_tokens(weights.reshape(-1, 1), route, (weights.size, 1))
    kernel = gate_up.reshape(num_experts, hidden_size, 2 * expert_size)
    gate, up = jnp.split(grouped_matmul(rows, kernel, group_sizes), 2, axis=-1)
    # As in `_expert`, the combine weight multiplies before the last product.
    rows = grouped_matmul(jax.nn.silu(gate) * up * row_weights, down, group_sizes)
    return _sum_rows_of_tokens(rows, route, weights.shape)


def _take_rows(x: Array, route: SortedAssignments, shape: tuple[int, ...]) -> Array:
    """[N, D] -> [N·K, D], one row an assignment; `shape` is (N, K)."""
    return x[route.assignment_of_row // shape[1]]


def _sum_rows(rows: Array, route: SortedAssignments, shape: tuple[int, ...]) -> Array:
    """[N·K, D] -> [N, D]."""
    return jnp.sum(rows[route.row_of_assignment].reshape(*shape, -1), axis=1)


# The two are each other's transpose. Saying so makes both directions a gather; the transpose that JAX derives is a
# scatter, which is slow.
_rows_of_tokens = jax.custom_vjp(_take_rows, nondiff_argnums=(2,))
_sum_rows_of_tokens = jax.custom_vjp(_sum_rows, nondiff_argnums=(2,))
_rows_of_tokens.defvjp(
    lambda x, route, shape: (_take_rows(x, route, shape), route),
    lambda shape, route, gradient: (_sum_rows(gradient, route, shape), None),
)
_sum_rows_of_tokens.defvjp(
    lambda rows, route, shape: (_sum_rows(rows, route, shape), route),
    lambda shape, route, gradient: (_take_rows(gradient, route, shape), None),
)


def run_experts_in_blocks(x: Array, weights: Array, expert_ids: Array, gate_up: Array, down: Array) -> Array:
    """`run_experts` by a loop over the experts and, in it, one over blocks of an expert's rows."""
    return _run_blocks(x, weights, gate_up, down, sort_assignments(expert_ids, gate_up.shape[0]))


def _expert(x: Array, weights: Array, gate_up: Array, down: Array) -> Array:
    """One expert on one block: [rows, D], [rows], [D, 2, F], [F, D] -> [rows, D].

    The combine weight multiplies before the last product, so that its gradient needs no expert output.
    """
    hidden_size, _, expert_size = gate_up.shape
    gate, up = jnp.split(x @ gate_up.reshape(hidden_size, 2 * expert_size), 2, axis=-1)
    return (jax.nn.silu(gate) * up * weights[:, None]) @ down


class _Blocks(NamedTuple):
    """Blocks of rows that begin anywhere. An expert's last block runs over into rows of the next expert: those count
    with weight 0, and what it writes for them is written again by their own expert, whose turn comes later."""

    assignments: Array
    """int32 [N·K + largest size]: those of the rows, so that a block may begin at the last of them."""
    route: SortedAssignments
    sizes: tuple[int, ...]
    """Large blocks for most of an expert's rows, small ones for the rest: few products, and few rows in vain."""

    @classmethod
    def of(cls, route: SortedAssignments, num_experts: int) -> "_Blocks":
        size = block_size_for(route.assignment_of_row.size, num_experts)
        sizes = (size, size // 4) if size >= 32 else (size,)
        return cls(jnp.pad(route.assignment_of_row, (0, size)), route, sizes)

    def loop(self, expert: Array, body: Callable[[Array, int, Any], Any], carry: Any) -> Any:
        """`carry = body(first_row, size, carry)` for each block of the expert."""
        first, end = self.route.group_bounds[expert], self.route.group_bounds[expert + 1]
        for size in self.sizes:
            spare = size - 1 if size == self.sizes[-1] else 0
            num_blocks = (end - first + spare) // size
            step = functools.partial(self._step, body, first, size)
            carry = jax.lax.fori_loop(0, num_blocks, step, carry)
            first = first + num_blocks * size
        return carry

    @staticmethod
    def _step(body: Callable[[Array, int, Any], Any], first: Array, size: int, block: Array, carry: Any) -> Any:
        return body(first + block * size, size, carry)

    def inputs(self, expert: Array, first: Array, size: int, x: Array, weights: Array) -> tuple[Array, Array, Array]:
        """The tokens of one block, their rows of x and their weights."""
        assignments = jax.lax.dynamic_slice_in_dim(self.assignments, first, size)
        own = first + jnp.arange(size, dtype=jnp.int32) < self.route.group_bounds[expert + 1]
        tokens = assignments // weights.shape[1]
        return tokens, x[tokens], jnp.where(own, weights.reshape(-1)[assignments], 0)

    def empty_rows(self, *shape: int, dtype: Any) -> Array:
        return jnp.zeros((self.assignments.size, *shape), dtype)


def _put(rows: Array, block: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, block, first, 0)


def _multiply_blocks(
    x: Array, weights: Array, route: SortedAssignments, parameters_of: Callable[[Array], tuple[Array, Array]]
) -> Array:
    num_experts = route.group_bounds.size - 1
    blocks = _Blocks.of(route, num_experts)
    in_use = jnp.diff(route.group_bounds) > 0
    used_first = jnp.argsort(~in_use, stable=True)

    def run_expert(index: Array, rows: Array) -> Array:
        expert = used_first[index]
        parameters = parameters_of(expert)

        def run_block(first: Array, size: int, rows: Array) -> Array:
            _, block_x, block_weights = blocks.inputs(expert, first, size, x, weights)
            return _put(rows, _expert(block_x, block_weights, *parameters), first)

        return blocks.loop(expert, run_block, rows)

    num_used = jnp.sum(in_use, dtype=jnp.int32)
    rows = jax.lax.fori_loop(0, num_used, run_expert, blocks.empty_rows(x.shape[1], dtype=x.dtype))
    return _sum_rows_of_tokens(rows, route, weights.shape)


@jax.custom_vjp
def _run_blocks(x: Array, weights: Array, gate_up: Array, down: Array, route: SortedAssignments) -> Array:
    return _multiply_blocks(x, weights, route, lambda expert: (gate_up[expert], down[expert]))


def _forward(x: Array, weights: Array, gate_up: Array, down: Array, route: SortedAssignments) -> tuple[Array, tuple]:
    return _run_blocks(x, weights, gate_up, down, route), (x, weights, gate_up, down, route)


def _backward(residuals: tuple, output_gradient: Array) -> tuple:
    x, weights, gate_up, down, route = residuals
    num_experts = gate_up.shape[0]
    blocks = _Blocks.of(route, num_experts)

    def run_expert(expert: Array, gradients: tuple) -> tuple:
        x_rows, weight_rows, gate_up_gradient, down_gradient = gradients
        parameters = gate_up[expert], down[expert]

        def run_block(first: Array, size: int, carry: tuple) -> tuple:
            x_rows, weight_rows, *sums = carry
            tokens, block_x, block_weights = blocks.inputs(expert, first, size, x, weights)
            _, vjp = jax.vjp(_expert, block_x, block_weights, *parameters)
            x_part, weight_part, *parts = vjp(output_gradient[tokens])
            sums = [total + part.astype(jnp.float32) for total, part in zip(sums, parts, strict=True)]
            return _put(x_rows, x_part, first), _put(weight_rows, weight_part, first), *sums

        zeros = [jnp.zeros(parameter.shape, jnp.float32) for parameter in parameters]
        x_rows, weight_rows, gate_up_sum, down_sum = blocks.loop(expert, run_block, (x_rows, weight_rows, *zeros))
        return (
            x_rows,
            weight_rows,
            gate_up_gradient.at[expert].set(gate_up_sum.astype(gate_up.dtype)),
            down_gradient.at[expert].set(down_sum.astype(down.dtype)),
        )

    start = (
        blocks.empty_rows(x.shape[1], dtype=x.dtype),
        blocks.empty_rows(dtype=weights.dtype),
        jnp.zeros_like(gate_up),
        jnp.zeros_like(down),
    )
    x_rows, weight_rows, *parameter_gradients = jax.lax.fori_loop(0, num_experts, run_expert, start)
    weight_gradient = weight_rows[route.row_of_assignment].reshape(weights.shape)
    return _sum_rows(x_rows, route, weights.shape), weight_gradient, *parameter_gradients, None


_run_blocks.defvjp(_forward, _backward)
