"""Runs each token through its chosen experts, and through no others.

Dropless, with static shapes, in one of two ways that `run_experts` chooses when the program is lowered. On TPUs and
GPUs the assignments (token, expert) are sorted by expert and go through two grouped products. On the CPU each expert
has a fixed number of places, a little more than its share, and all experts multiply at once, which XLA's CPU does
better than the small products of a loop; the assignments for which no place is left go through such a loop, block by
block. So does the whole backward pass: there the wide intermediate activations of a block stay in the processor's
cache, and computing them again costs less than writing and reading them all. Biases of the last product take no part
in any of this: `add_down_bias` gives all tokens theirs in one product. Pure functions of arrays: this file must never
know a router, a model or its configuration.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from models.kernels.grouped_matmul import block_size_for, grouped_matmul
from rspo_jax.sharding import platform

Array = jax.Array


Activation = Literal["silu", "clamped"]
CLAMP_LIMIT, CLAMP_SLOPE = 7.0, 1.702
"""Of gpt-oss."""


class Experts(NamedTuple):
    """The parameters of the experts of one layer, or with a leading axis L of a stack of layers."""

    gate_up: Array
    """float [E, D, 2, F], gate and up projections."""
    down: Array
    """float [E, F, D]."""
    gate_up_bias: Array | None = None
    """float [E, 2, F]."""
    down_bias: Array | None = None
    """float [E, D]."""


def activate(gate: Array, up: Array, activation: Activation = "silu") -> Array:
    """The hidden layer of an expert, or of any gated block, from its two projections: float, all of one shape.

    "silu" is SwiGLU, gate · σ(gate) · up. "clamped" is that of gpt-oss, gate · σ(1.702 · gate) · (up + 1) with gate at
    most 7 and up within ±7; a clamped number has gradient 0.

    Raises:
      ValueError: there is no such activation.
    """
    gate, up, exponent = _factors(gate, up, activation)
    return gate * jax.nn.sigmoid(exponent) * up


def _factors(gate: Array, up: Array, activation: Activation) -> tuple[Array, Array, Array]:
    """The hidden layer is gate · σ(exponent) · up of these."""
    if activation == "silu":
        return gate, up, gate
    if activation != "clamped":
        raise ValueError(f"activation must be 'silu' or 'clamped', got {activation!r}")
    # Not `jnp.clip`, which halves the gradient of a number that is at the limit, as bfloat16 often is.
    gate = jnp.where(gate > CLAMP_LIMIT, CLAMP_LIMIT, gate)
    up = jnp.where(jnp.abs(up) > CLAMP_LIMIT, CLAMP_LIMIT * jnp.sign(up), up)
    return gate, up + 1, CLAMP_SLOPE * gate


def run_experts(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation = "silu"
) -> Array:
    """Σ_k weights[n, k] · expert `expert_ids[n, k]` of x[n].

    Args:
      x: float [N, D].
      weights: float [N, K], the combine weights, in the dtype of x.
      expert_ids: int [N, K], in [0, E], where E stands for no expert: it adds nothing, and its weight has gradient 0.
      experts: in the dtype of x.
      activation: see `activate`.

    Returns:
      float [N, D] in the dtype of x. Differentiable (reverse mode) in x, weights and experts.
    """
    weights = jnp.where(expert_ids < experts.down.shape[0], weights, 0)
    run = run_experts_in_places if platform() == "cpu" else run_experts_sorted
    mixed: Any = run(x, weights, expert_ids, experts._replace(down_bias=None), activation)
    return add_down_bias(mixed, weights, expert_ids, experts.down_bias)


def add_down_bias(mixed: Array, weights: Array, expert_ids: Array, down_bias: Array | None) -> Array:
    """mixed[…] + Σ_k weights[…, k] · down_bias[expert_ids[…, k]].

    A product with the weights of all experts: they are few, and its gradient is a product too and not a scatter.

    Args:
      mixed: float […, D].
      weights: float […, K].
      expert_ids: int […, K], in [0, E], where E has no bias.
      down_bias: float [E, D], or None for `mixed` as it is.
    """
    if down_bias is None:
        return mixed
    chosen = jax.nn.one_hot(expert_ids, down_bias.shape[0], dtype=weights.dtype)
    of_experts = jnp.sum(chosen * weights[..., None], axis=-2)
    return mixed + _exact_product(of_experts, down_bias)


def _exact_product(left: Array, bias: Array) -> Array:
    """[…, E] · [E, F] without the rounding of float32 that is usual on TPUs, because an addition would not round."""
    return jnp.einsum("...e,ef->...f", left, bias, precision=jax.lax.Precision.HIGHEST)


def run_experts_of_layer(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layer: Array, activation: Activation = "silu"
) -> Array:
    """`run_experts` with the experts of one layer of a stack, without gradient, for decoding.

    A few tokens touch few weights: on the CPU only those of the experts in use are read, from where they lie in the
    stack, while a slice of the whole layer would copy them all at every step.

    Args:
      x: float [N, D].
      weights: float [N, K].
      expert_ids: int [N, K].
      experts: of all layers, with a leading axis L, in any floating dtype; products are in that of x.
      layer: int32 scalar.
      activation: see `activate`.

    Returns:
      float [N, D] in the dtype of x.
    """
    run = _run_blocks_of_layer if platform() == "cpu" else _run_sorted_layer
    mixed = run(x, weights, expert_ids, experts._replace(down_bias=None), layer, activation)
    down_bias = None if experts.down_bias is None else experts.down_bias[layer].astype(x.dtype)
    return add_down_bias(mixed, weights, expert_ids, down_bias)


def _run_blocks_of_layer(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layer: Array, activation: Activation
) -> Array:
    route = sort_assignments(expert_ids, experts.down.shape[1])

    def parameters_of(expert: Array) -> Experts:
        return jax.tree.map(lambda stack: stack[layer, expert].astype(x.dtype), experts)

    return _multiply_blocks(x, weights, route, parameters_of, activation)


def _run_sorted_layer(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layer: Array, activation: Activation
) -> Array:
    of_layer = jax.tree.map(lambda stack: stack[layer].astype(x.dtype), experts)
    return run_experts_sorted(x, weights, expert_ids, of_layer, activation)


class SortedAssignments(NamedTuple):
    """The assignments in the order of their experts, one a row. Assignment n·K + k is token n's k-th."""

    assignment_of_row: Array
    """int32 [N·K]; an arbitrary one at rows that are no expert's."""
    row_of_assignment: Array
    """int32 [N·K]: the inverse; some row beyond those of all experts for an assignment to none."""
    group_bounds: Array
    """int32 [E + 1]: rows group_bounds[e] to group_bounds[e + 1] are expert e's. The rest is no expert's."""


def sort_assignments(expert_ids: Array, num_experts: int) -> SortedAssignments:
    """expert_ids: int [N, K], each in [0, num_experts], where the last stands for no expert."""
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    return SortedAssignments(order, jnp.zeros_like(flat).at[order].set(rows, unique_indices=True), group_bounds)


def run_experts_sorted(x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation) -> Array:
    """`run_experts` without `down_bias`, by two grouped products over the assignments in the order of their experts."""
    num_experts, hidden_size, _, expert_size = experts.gate_up.shape
    route = sort_assignments(expert_ids, num_experts)
    group_sizes = jnp.diff(route.group_bounds)
    # What the products make of rows that are no expert's, and their gradients, is unspecified: it must not get out.
    own = (jnp.arange(weights.size, dtype=jnp.int32) < route.group_bounds[-1])[:, None]
    rows = jnp.where(own, _rows_of_tokens(x, route, weights.shape), 0)
    row_weights = jnp.where(own, _rows_of_tokens(weights.reshape(-1, 1), route, (weights.size, 1)), 0)
    kernel = experts.gate_up.reshape(num_experts, hidden_size, 2 * expert_size)
    hidden = grouped_matmul(rows, kernel, group_sizes)
    if experts.gate_up_bias is not None:
        hidden = hidden + jnp.where(own, _bias_of_rows(experts.gate_up_bias, route), 0)
    gate, up = jnp.split(hidden, 2, axis=-1)
    # As in `_expert`, the combine weight multiplies before the last product.
    rows = grouped_matmul(activate(gate, up, activation) * row_weights, experts.down, group_sizes)
    return _sum_rows_of_tokens(jnp.where(own, rows, 0), route, weights.shape)


def _bias_of_rows(gate_up_bias: Array, route: SortedAssignments) -> Array:
    """[E, 2, F] -> [N·K, 2·F]. A product, so that its gradient is one too."""
    row = jnp.arange(route.assignment_of_row.size, dtype=jnp.int32)[:, None]
    chosen = (row >= route.group_bounds[None, :-1]) & (row < route.group_bounds[None, 1:])
    return _exact_product(chosen.astype(gate_up_bias.dtype), gate_up_bias.reshape(gate_up_bias.shape[0], -1))


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


def _expert(x: Array, weights: Array, expert: Experts, activation: Activation) -> Array:
    """One expert, without axis E, on one block: [rows, D], [rows] -> [rows, D].

    The combine weight multiplies before the last product, so that its gradient needs no expert output.
    """
    hidden_size, _, expert_size = expert.gate_up.shape
    hidden = x @ expert.gate_up.reshape(hidden_size, 2 * expert_size)
    if expert.gate_up_bias is not None:
        hidden = hidden + expert.gate_up_bias.reshape(1, 2 * expert_size)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return (activate(gate, up, activation) * weights[:, None]) @ expert.down


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

    def loop(self, expert: Array, body: Callable[[Array, int, Any], Any], carry: Any, skip: int = 0) -> Any:
        """`carry = body(first_row, size, carry)` for each block of the expert's rows after the first `skip`."""
        end = self.route.group_bounds[expert + 1]
        first = jnp.minimum(self.route.group_bounds[expert] + skip, end)
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


def _put(rows: Array, block: Array, first: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, block, first, 0)


def _fold_blocks(
    blocks: _Blocks,
    x: Array,
    weights: Array,
    parameters_of: Callable[[Array], Experts],
    activation: Activation,
    write: Callable[[Array, Array, Array, Array], Array],
    carry: Array,
    skip: int = 0,
) -> Array:
    """`carry = write(carry, first_row, tokens, output)` for each block of each expert's rows after the first `skip`.

    Experts that have no such rows are passed over, and their parameters are not read.
    """
    concerned = jnp.diff(blocks.route.group_bounds) > skip
    order = jnp.argsort(~concerned, stable=True)

    def run_expert(index: Array, carry: Array) -> Array:
        expert = order[index]
        parameters = parameters_of(expert)

        def run_block(first: Array, size: int, carry: Array) -> Array:
            tokens, block_x, block_weights = blocks.inputs(expert, first, size, x, weights)
            return write(carry, first, tokens, _expert(block_x, block_weights, parameters, activation))

        return blocks.loop(expert, run_block, carry, skip)

    return jax.lax.fori_loop(0, jnp.sum(concerned, dtype=jnp.int32), run_expert, carry)


def _multiply_blocks(
    x: Array,
    weights: Array,
    route: SortedAssignments,
    parameters_of: Callable[[Array], Experts],
    activation: Activation,
) -> Array:
    def write(rows: Array, first: Array, tokens: Array, output: Array) -> Array:
        del tokens
        return _put(rows, output, first)

    blocks = _Blocks.of(route, route.group_bounds.size - 1)
    rows = jnp.zeros((blocks.assignments.size, x.shape[1]), x.dtype)
    rows = _fold_blocks(blocks, x, weights, parameters_of, activation, write, rows)
    return _sum_rows_of_tokens(rows, route, weights.shape)


class _Places(NamedTuple):
    """C places for each expert; the c-th row of expert e has place e·C + c, if it has one."""

    assignments: Array
    """int32 [E·C]: whose place it is; some other's where a place is empty."""
    taken: Array
    """bool [E·C]."""
    place_of_assignment: Array
    """int32 [N·K]; E·C where none is left."""

    @classmethod
    def of(cls, route: SortedAssignments, expert_ids: Array) -> "_Places":
        flat, num_experts = expert_ids.reshape(-1), route.group_bounds.size - 1
        places = _places_of_each(flat.size, num_experts)
        rows = route.group_bounds[:-1, None] + jnp.arange(places, dtype=jnp.int32)[None, :]
        taken = rows < route.group_bounds[1:, None]
        assignments = route.assignment_of_row[jnp.minimum(rows, flat.size - 1)]
        rank = route.row_of_assignment - route.group_bounds[flat]
        place = jnp.where(rank < places, flat.astype(jnp.int32) * places + rank, num_experts * places)
        # Without the barrier XLA computes all this again in every kernel that gathers by it.
        return cls(*jax.lax.optimization_barrier((assignments.reshape(-1), taken.reshape(-1), place)))

    def take(self, x: Array, shape: tuple[int, ...]) -> Array:
        """[N, D] -> [E·C, D]; `shape` is (N, K)."""
        return x[self.assignments // shape[1]]

    def weights(self, weights: Array) -> Array:
        """[N, K] -> [E·C]."""
        return jax.lax.optimization_barrier(weights.reshape(-1)[self.assignments])

    def clear_empty(self, rows: Array) -> Array:
        """[E, C, F], 0 where a place is empty."""
        return jnp.where(self.taken.reshape(*rows.shape[:2], 1), rows, 0)

    def sum_of_tokens(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """[E, C, D] -> [N, D]; an assignment without a place counts 0."""
        spare = jnp.zeros((1, rows.shape[-1]), rows.dtype)
        flat = jnp.concatenate([rows.reshape(-1, rows.shape[-1]), spare])
        return jnp.sum(flat[self.place_of_assignment].reshape(*shape, -1), axis=1)


def _places_of_each(assignments: int, num_experts: int) -> int:
    """A little more than an even share, in eights: empty places cost little less than full ones."""
    share = -(-assignments // num_experts)
    return -(-(share + share // 32) // 8) * 8


def _rank_assignments(expert_ids: Array, num_experts: int) -> SortedAssignments:
    """`sort_assignments` by counting, which on a CPU takes a fraction of the time of a sort.

    The rank of an assignment among those of its expert is the number of equal ones before it: before its block of 64,
    and within it, by a product with a triangle of ones, exact in float32 below 2**24 assignments.
    """
    block = 64
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    padded = jnp.pad(flat, (0, -flat.size % block), constant_values=num_experts).reshape(-1, block)
    chosen = jax.nn.one_hot(padded, num_experts, dtype=jnp.float32)  # zeros for the padding
    earlier = jnp.tril(jnp.ones((block, block), jnp.float32), -1)
    within = jnp.einsum("ij,bje->bie", earlier, chosen)
    of_block = jnp.sum(chosen, axis=1)
    before = jnp.cumsum(of_block, axis=0) - of_block
    rank = jnp.sum((within + before[:, None]) * chosen, axis=-1).reshape(-1)[: flat.size].astype(jnp.int32)
    sizes = jnp.sum(of_block, axis=0).astype(jnp.int32)
    group_bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])
    row_of_assignment = group_bounds[flat] + rank
    assignments = jnp.arange(flat.size, dtype=jnp.int32)
    row_or_none = jnp.where(flat < num_experts, row_of_assignment, flat.size)
    order = jnp.zeros_like(flat).at[row_or_none].set(assignments, mode="drop")
    return SortedAssignments(order, row_of_assignment, group_bounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_experts_in_places(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation
) -> Array:
    """`run_experts`, without `down_bias`, by batched products over the places of all experts, and a loop for what has
    no place; the backward pass by the loop alone."""
    return _forward(x, weights, expert_ids, experts, activation)[0]


def _forward(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation
) -> tuple[Array, tuple]:
    num_experts, hidden_size, _, expert_size = experts.gate_up.shape
    route = _rank_assignments(expert_ids, num_experts)
    places = _Places.of(route, expert_ids)
    rows = places.take(x, weights.shape).reshape(num_experts, -1, hidden_size)
    hidden = _product("ecd,edf->ecf", rows, experts.gate_up.reshape(num_experts, hidden_size, 2 * expert_size))
    if experts.gate_up_bias is not None:
        hidden = hidden + experts.gate_up_bias.reshape(num_experts, 1, 2 * expert_size)
    gate, up = jnp.split(hidden, 2, axis=-1)
    gate, up, exponent = _factors(gate, up, activation)
    row_weights = places.weights(weights).reshape(num_experts, -1, 1)
    weighted = jax.lax.optimization_barrier(places.clear_empty(gate * up / (1 + jnp.exp(-exponent)) * row_weights))
    output = _product("ecf,efd->ecd", weighted, experts.down)
    mixed = places.sum_of_tokens(output, weights.shape)
    mixed = _add_rest(mixed, x, weights, route, experts, activation)
    return mixed, (x, weights, experts, route)


def _product(spec: str, left: Array, right: Array) -> Array:
    # The barrier keeps the elementwise operations around a product out of it: fused, they slow it down.
    return jax.lax.optimization_barrier(jnp.einsum(spec, left, right))


def _add_rest(
    mixed: Array, x: Array, weights: Array, route: SortedAssignments, experts: Experts, activation: Activation
) -> Array:
    """Adds what the experts make of the assignments that have no place."""

    def write(mixed: Array, first: Array, tokens: Array, output: Array) -> Array:
        del first
        return mixed.at[tokens].add(output)

    num_experts = experts.down.shape[0]
    blocks, places = _Blocks.of(route, num_experts), _places_of_each(weights.size, num_experts)
    parameters_of = functools.partial(_one_of, experts)
    return _fold_blocks(blocks, x, weights, parameters_of, activation, write, mixed, skip=places)


def _one_of(experts: Experts, expert: Array) -> Experts:
    return jax.tree.map(lambda parameter: parameter[expert], experts)


def _backward(activation: Activation, residuals: tuple, output_gradient: Array) -> tuple:
    x, weights, experts, route = residuals
    blocks = _Blocks.of(route, experts.down.shape[0])
    run = functools.partial(_expert, activation=activation)

    def run_expert(expert: Array, gradients: tuple) -> tuple:
        x_rows, weight_rows, expert_gradients = gradients
        parameters = _one_of(experts, expert)

        def run_block(first: Array, size: int, carry: tuple) -> tuple:
            x_rows, weight_rows, sums = carry
            tokens, block_x, block_weights = blocks.inputs(expert, first, size, x, weights)
            _, vjp = jax.vjp(run, block_x, block_weights, parameters)
            x_part, weight_part, parts = vjp(output_gradient[tokens])
            sums = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), sums, parts)
            return _put(x_rows, x_part, first), _put(weight_rows, weight_part, first), sums

        zeros = jax.tree.map(lambda parameter: jnp.zeros(parameter.shape, jnp.float32), parameters)
        x_rows, weight_rows, sums = blocks.loop(expert, run_block, (x_rows, weight_rows, zeros))
        written = jax.tree.map(
            lambda whole, total: whole.at[expert].set(total.astype(whole.dtype)), expert_gradients, sums
        )
        return x_rows, weight_rows, written

    rows = blocks.assignments.size
    start = (
        jnp.zeros((rows, x.shape[1]), x.dtype),
        jnp.zeros(rows, weights.dtype),
        jax.tree.map(jnp.zeros_like, experts),
    )
    x_rows, weight_rows, expert_gradients = jax.lax.fori_loop(0, experts.down.shape[0], run_expert, start)
    weight_gradient = weight_rows[route.row_of_assignment].reshape(weights.shape)
    return _sum_rows(x_rows, route, weights.shape), weight_gradient, None, expert_gradients


run_experts_in_places.defvjp(_forward, _backward)
