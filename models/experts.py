"""Experts of a layer as pure functions of arrays: each token goes through its chosen ones, and through no others.

No token is ever dropped, and shapes are static. `run_experts` has two implementations and chooses one while the program
is traced. On TPUs and GPUs the assignments (token, expert) are sorted by expert and go through two grouped products. On
the CPU each expert has a fixed number of places, a little more than its share, and all experts multiply at once, which
XLA does better there than the small products of a loop; the assignments for which no place is left go through such a
loop, block by block. So does the whole backward pass: the wide intermediate activations of a block then stay in the
processor's cache, and computing them again costs less than writing and reading them all. `add_down_bias` adds the
biases of the last product for all tokens at once, whichever implementation runs.
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
"""Constants of gpt-oss' activation."""


class Experts(NamedTuple):
    """The parameters of the experts of one layer, or with a leading axis L those of a stack of layers."""

    gate_up: Array
    """float [E, D, 2, F], gate and up projections."""
    down: Array
    """float [E, F, D]."""
    gate_up_bias: Array | None = None
    """float [E, 2, F]."""
    down_bias: Array | None = None
    """float [E, D]."""


def activate(gate: Array, up: Array, activation: Activation = "silu") -> Array:
    """Return the hidden layer of an expert, or of any gated block.

    Args:
      gate: float, the gate projection.
      up: float of the same shape, the up projection.
      activation: "silu" is SwiGLU, gate · σ(gate) · up. "clamped" is that of gpt-oss, gate · σ(1.702 · gate) · (up + 1)
        with gate at most 7 and up within ±7; a clamped number has gradient 0.

    Raises:
      ValueError: if there is no such activation.
    """
    gate, up, exponent = _factors(gate, up, activation)
    return gate * jax.nn.sigmoid(exponent) * up


def _factors(gate: Array, up: Array, activation: Activation) -> tuple[Array, Array, Array]:
    """Return gate, up and exponent, of which the hidden layer is gate · σ(exponent) · up."""
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
    """Return Σ_k weights[n, k] · expert `expert_ids[n, k]` of x[n].

    Args:
      x: float [N, D].
      weights: float [N, K], the combine weights, in the dtype of x.
      expert_ids: int [N, K], in [0, E], where E stands for no expert: it adds nothing, and its weight has gradient 0.
      experts: the parameters, in the dtype of x.
      activation: as for `activate`.

    Returns:
      float [N, D] in the dtype of x. Differentiable (reverse mode) in x, weights and experts.
    """
    weights = jnp.where(expert_ids < experts.down.shape[0], weights, 0)
    run = run_experts_in_places if platform() == "cpu" else run_experts_sorted
    mixed: Any = run(x, weights, expert_ids, experts._replace(down_bias=None), activation)
    return add_down_bias(mixed, weights, expert_ids, experts.down_bias)


def add_down_bias(mixed: Array, weights: Array, expert_ids: Array, down_bias: Array | None) -> Array:
    """Return mixed[…] + Σ_k weights[…, k] · down_bias[expert_ids[…, k]].

    It is a product with the weights of all experts: they are few, and its gradient is a product too, not a scatter.

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
    # Without the rounding of float32 that is usual on TPUs, because an addition would not round.
    return mixed + jnp.einsum("...e,ef->...f", of_experts, down_bias, precision=jax.lax.Precision.HIGHEST)


def run_experts_of_layer(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, layer: Array, activation: Activation = "silu"
) -> Array:
    """Run the chosen experts of one layer of a stack, for decoding; see `run_experts`. There is no gradient.

    A few tokens touch few weights: on the CPU only those of the experts in use are read, from where they lie in the
    stack, while a slice of the whole layer would copy them all at every step.

    Args:
      x: float [N, D].
      weights: float [N, K].
      expert_ids: int [N, K].
      experts: the parameters of all layers, with a leading axis L, in any floating dtype; products are in that of x.
      layer: int32 scalar.
      activation: as for `activate`.

    Returns:
      float [N, D] in the dtype of x.
    """
    without_bias = experts._replace(down_bias=None)
    if platform() == "cpu":
        num_experts = experts.down.shape[1]
        route = sort_assignments(expert_ids, num_experts)
        blocks = _Blocks.of(route, num_experts)

        def parameters_of(expert: Array) -> Experts:
            return jax.tree.map(lambda stack: stack[layer, expert].astype(x.dtype), without_bias)

        def write(rows: Array, first: Array, tokens: Array, output: Array) -> Array:
            del tokens
            return jax.lax.dynamic_update_slice_in_dim(rows, output, first, 0)

        rows = jnp.zeros((blocks.assignments.size, x.shape[1]), x.dtype)
        rows = _fold_blocks(blocks, x, weights, parameters_of, activation, write, rows)
        mixed = _sum_rows_of_tokens(rows, route, weights.shape)
    else:
        of_layer = jax.tree.map(lambda stack: stack[layer].astype(x.dtype), without_bias)
        mixed = run_experts_sorted(x, weights, expert_ids, of_layer, activation)
    down_bias = None if experts.down_bias is None else experts.down_bias[layer].astype(x.dtype)
    return add_down_bias(mixed, weights, expert_ids, down_bias)


class SortedAssignments(NamedTuple):
    """The assignments in the order of their experts, one a row. Assignment n·K + k is token n's k-th."""

    assignment_of_row: Array
    """int32 [N·K]; an arbitrary one at rows that belong to no expert."""
    row_of_assignment: Array
    """int32 [N·K]: the inverse; some row beyond those of all experts for an assignment to none."""
    group_bounds: Array
    """int32 [E + 1]: rows group_bounds[e] to group_bounds[e + 1] are expert e's. Later rows belong to none."""


def sort_assignments(expert_ids: Array, num_experts: int) -> SortedAssignments:
    """Sort the assignments by their experts.

    Args:
      expert_ids: int [N, K], each in [0, num_experts], where the last stands for no expert.
      num_experts: E.
    """
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    group_bounds = jnp.searchsorted(flat[order], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    rows = jnp.arange(flat.size, dtype=jnp.int32)
    return SortedAssignments(order, jnp.zeros_like(flat).at[order].set(rows, unique_indices=True), group_bounds)


def run_experts_sorted(x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation) -> Array:
    """Run the chosen experts, without `down_bias`, by two grouped products over the sorted assignments."""
    num_experts, hidden_size, _, expert_size = experts.gate_up.shape
    route = sort_assignments(expert_ids, num_experts)
    group_sizes = jnp.diff(route.group_bounds)
    # Rows that belong to no expert: products and gradients are unspecified there, so they are masked on both sides.
    own = (jnp.arange(weights.size, dtype=jnp.int32) < route.group_bounds[-1])[:, None]
    rows = jnp.where(own, _rows_of_tokens(x, route, weights.shape), 0)
    row_weights = jnp.where(own, _rows_of_tokens(weights.reshape(-1, 1), route, (weights.size, 1)), 0)
    kernel = experts.gate_up.reshape(num_experts, hidden_size, 2 * expert_size)
    hidden = grouped_matmul(rows, kernel, group_sizes)
    if experts.gate_up_bias is not None:
        # A product, as in `add_down_bias`, so that its gradient is one too.
        row = jnp.arange(route.assignment_of_row.size, dtype=jnp.int32)[:, None]
        chosen = (row >= route.group_bounds[None, :-1]) & (row < route.group_bounds[None, 1:])
        biases = experts.gate_up_bias.reshape(num_experts, 2 * expert_size)
        bias = jnp.einsum("re,ef->rf", chosen.astype(biases.dtype), biases, precision=jax.lax.Precision.HIGHEST)
        hidden = hidden + jnp.where(own, bias, 0)
    gate, up = jnp.split(hidden, 2, axis=-1)
    # As in `_expert`, the combine weight multiplies before the last product.
    rows = grouped_matmul(activate(gate, up, activation) * row_weights, experts.down, group_sizes)
    return _sum_rows_of_tokens(jnp.where(own, rows, 0), route, weights.shape)


def _take_rows(x: Array, route: SortedAssignments, shape: tuple[int, ...]) -> Array:
    """Return the rows of the tokens, one an assignment, [N, D] -> [N·K, D]; `shape` is (N, K)."""
    return x[route.assignment_of_row // shape[1]]


def _sum_rows(rows: Array, route: SortedAssignments, shape: tuple[int, ...]) -> Array:
    """Sum the rows of each token's assignments, [N·K, D] -> [N, D]."""
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
    """Run one expert, without axis E, on one block: [rows, D], [rows] -> [rows, D].

    The combine weight multiplies before the last product, so that its gradient needs no expert output.
    """
    hidden_size, _, expert_size = expert.gate_up.shape
    hidden = x @ expert.gate_up.reshape(hidden_size, 2 * expert_size)
    if expert.gate_up_bias is not None:
        hidden = hidden + expert.gate_up_bias.reshape(1, 2 * expert_size)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return (activate(gate, up, activation) * weights[:, None]) @ expert.down


class _Blocks(NamedTuple):
    """Blocks of rows that may begin anywhere.

    An expert's last block runs over into rows of the next expert. They count with weight 0, and their own expert, whose
    turn comes later, overwrites what the block writes for them.
    """

    assignments: Array
    """int32 [N·K + largest size]: the assignments of the rows, padded so that a block may begin at the last of them."""
    route: SortedAssignments
    sizes: tuple[int, ...]
    """Sizes of blocks: a large one for most of an expert's rows, a small one for the rest, so that products are few and
    few rows are computed in vain."""

    @classmethod
    def of(cls, route: SortedAssignments, num_experts: int) -> "_Blocks":
        size = block_size_for(route.assignment_of_row.size, num_experts)
        sizes = (size, size // 4) if size >= 32 else (size,)
        return cls(jnp.pad(route.assignment_of_row, (0, size)), route, sizes)

    def loop(self, expert: Array, body: Callable[[Array, int, Any], Any], carry: Any, skip: int = 0) -> Any:
        """Run `carry = body(first_row, size, carry)` for each block of the expert's rows after the first `skip`."""
        end = self.route.group_bounds[expert + 1]
        first = jnp.minimum(self.route.group_bounds[expert] + skip, end)
        for size in self.sizes:
            spare = size - 1 if size == self.sizes[-1] else 0
            num_blocks = (end - first + spare) // size
            carry = jax.lax.fori_loop(
                0, num_blocks, lambda block, carry, at=first, size=size: body(at + block * size, size, carry), carry
            )
            first = first + num_blocks * size
        return carry

    def inputs(self, expert: Array, first: Array, size: int, x: Array, weights: Array) -> tuple[Array, Array, Array]:
        """Return the tokens of one block, their rows of x and their weights."""
        assignments = jax.lax.dynamic_slice_in_dim(self.assignments, first, size)
        own = first + jnp.arange(size, dtype=jnp.int32) < self.route.group_bounds[expert + 1]
        tokens = assignments // weights.shape[1]
        return tokens, x[tokens], jnp.where(own, weights.reshape(-1)[assignments], 0)


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
    """Run `carry = write(carry, first_row, tokens, output)` for each block of all rows but each expert's first `skip`.

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


class _Places(NamedTuple):
    """C places for each expert; the c-th row of expert e has place e·C + c, if it has one."""

    assignments: Array
    """int32 [E·C]: the assignment that has the place; an arbitrary one where the place is empty."""
    taken: Array
    """bool [E·C]: False where the place is empty."""
    place_of_assignment: Array
    """int32 [N·K]: its place; E·C where none was left."""

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


def _places_of_each(assignments: int, num_experts: int) -> int:
    """Return C: little more than an even share, as empty places cost nearly as much as full ones; a multiple of 8."""
    share = -(-assignments // num_experts)
    return -(-(share + share // 32) // 8) * 8


def _rank_assignments(expert_ids: Array, num_experts: int) -> SortedAssignments:
    """Sort the assignments as `sort_assignments` does, by counting, in a fraction of the time of a sort on a CPU.

    The rank of an assignment among those of its expert is the number of equal ones before it. It is the sum of those
    before its block of 64 and those before it in the block. The latter come from a product with a triangle of ones,
    which is exact in float32 below 2**24 assignments.
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
    """Run the chosen experts, without `down_bias`, by batched products over the places of all experts.

    A loop runs the assignments that have no place; the backward pass is that loop alone, over all assignments.
    """
    return _forward(x, weights, expert_ids, experts, activation)[0]


def _forward(
    x: Array, weights: Array, expert_ids: Array, experts: Experts, activation: Activation
) -> tuple[Array, tuple]:
    num_experts, hidden_size, _, expert_size = experts.gate_up.shape
    route = _rank_assignments(expert_ids, num_experts)
    places = _Places.of(route, expert_ids)

    # All experts at once, on their places [E, C, …]. The barriers keep the elementwise operations around a product out
    # of it: fused, they slow it down.
    rows = x[places.assignments // weights.shape[1]].reshape(num_experts, -1, hidden_size)
    gate_up = experts.gate_up.reshape(num_experts, hidden_size, 2 * expert_size)
    hidden = jax.lax.optimization_barrier(jnp.einsum("ecd,edf->ecf", rows, gate_up))
    if experts.gate_up_bias is not None:
        hidden = hidden + experts.gate_up_bias.reshape(num_experts, 1, 2 * expert_size)
    gate, up = jnp.split(hidden, 2, axis=-1)
    gate, up, exponent = _factors(gate, up, activation)
    row_weights = jax.lax.optimization_barrier(weights.reshape(-1)[places.assignments])
    weighted = gate * up / (1 + jnp.exp(-exponent)) * row_weights.reshape(num_experts, -1, 1)
    weighted = jnp.where(places.taken.reshape(num_experts, -1, 1), weighted, 0)
    output = jnp.einsum("ecf,efd->ecd", jax.lax.optimization_barrier(weighted), experts.down)
    output = jax.lax.optimization_barrier(output).reshape(-1, hidden_size)

    # Back to the tokens; an assignment without a place reads the row of zeros at the end.
    output = jnp.concatenate([output, jnp.zeros((1, hidden_size), output.dtype)])
    mixed = jnp.sum(output[places.place_of_assignment].reshape(*weights.shape, -1), axis=1)

    # The assignments without a place, in a loop.
    def parameters_of(expert: Array) -> Experts:
        return jax.tree.map(lambda parameter: parameter[expert], experts)

    def write(mixed: Array, first: Array, tokens: Array, output: Array) -> Array:
        del first
        return mixed.at[tokens].add(output)

    blocks, skip = _Blocks.of(route, num_experts), _places_of_each(weights.size, num_experts)
    mixed = _fold_blocks(blocks, x, weights, parameters_of, activation, write, mixed, skip)
    return mixed, (x, weights, experts, route)


def _backward(activation: Activation, residuals: tuple, output_gradient: Array) -> tuple:
    x, weights, experts, route = residuals
    blocks = _Blocks.of(route, experts.down.shape[0])
    run = functools.partial(_expert, activation=activation)

    def run_expert(expert: Array, gradients: tuple) -> tuple:
        x_rows, weight_rows, expert_gradients = gradients
        parameters = jax.tree.map(lambda parameter: parameter[expert], experts)

        def run_block(first: Array, size: int, carry: tuple) -> tuple:
            x_rows, weight_rows, sums = carry
            tokens, block_x, block_weights = blocks.inputs(expert, first, size, x, weights)
            _, vjp = jax.vjp(run, block_x, block_weights, parameters)
            x_part, weight_part, parts = vjp(output_gradient[tokens])
            x_rows = jax.lax.dynamic_update_slice_in_dim(x_rows, x_part, first, 0)
            weight_rows = jax.lax.dynamic_update_slice_in_dim(weight_rows, weight_part, first, 0)
            return x_rows, weight_rows, jax.tree.map(lambda total, part: total + part.astype(jnp.float32), sums, parts)

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
