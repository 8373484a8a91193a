"""Token log-probabilities and entropies straight from hidden states, without an array of logits [B, T, V].

The vocabulary is visited in blocks of columns, forward and backward. Each block's logits are computed, folded into a
few numbers a token and dropped; the backward pass computes them again and writes each column of the head's gradient
once. On a mesh every device visits its own columns for its own rows, and the results are summed over the mesh once.

Sources: the running maximum and sum over blocks are those of Milakov and Gimelshein, "Online normalizer calculation for
softmax", arXiv 1805.02867. A cross-entropy without stored logits is also in Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models", arXiv 2411.09009. The entropy and its optional gradient are this library's own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rspo_jax.log_probs.from_logits import check_targets, check_temperature
from rspo_jax.sharding import axes_of, check_split, free_axes, on_each_device, split_axes
from rspo_jax.types import Array

BLOCK_BYTES = 8 * 2**20
"""Largest size of a block's float32 logits, unless `MIN_COLUMNS` asks for more."""
MIN_COLUMNS = 2048
"""Least number of columns of a block: about the hidden size of a large model, so that the logits of a block are never
much larger than the hidden states."""


class TokenScores(NamedTuple):
    """Log-probability and entropy of each target token of a batch."""

    log_probs: Array
    """float32 [B, T]."""
    entropy: Array
    """float32 [B, T], in nats; without a gradient unless it was asked for."""


class _Mesh(NamedTuple):
    """The mesh axes that split the work; all empty without a mesh."""

    rows: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()


class _Settings(NamedTuple):
    """Values that are fixed while tracing."""

    temperature: float
    columns: int | None
    """Columns of a block; None: chosen from the shapes."""
    entropy_gradient: bool
    mesh: _Mesh = _Mesh()


class _RowSums(NamedTuple):
    """Sums over the logits x of a token that one pass keeps, each [B, T]."""

    maximum: Array
    sum_exp: Array
    """Σ exp(x − maximum)."""
    weighted: Array
    """Σ exp(x − maximum) · (x − maximum)."""
    target: Array
    """The logit of the target; 0 until its column has been visited."""


def head_log_probs(
    hidden: Array,
    head: Array,
    targets: Array,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
    block_columns: int | None = None,
) -> TokenScores:
    """Score each target under softmax(hidden · head / temperature), without the logits.

    Equal to `token_log_probs` and `token_entropy` of
    `einsum("btd,dv->btv", hidden, head, preferred_element_type=float32)`. Memory beyond arguments and gradients is a
    few arrays of B · T · `MIN_COLUMNS` numbers or of `BLOCK_BYTES`, whichever is more, whatever V is. Products
    accumulate in float32, and everything elementwise is float32; float64 stays float64. The backward pass rounds the
    gradient of a block's logits to the dtype of hidden before it enters the two products.

    The entropy is a statistic: its gradient is zero, as if behind `jax.lax.stop_gradient`. A loss with an entropy term
    asks for its gradient, which costs a few more operations a logit and no memory.

    Under a mesh set by `jax.set_mesh`, rows, tokens and vocabulary are split as `rspo_jax.sharding.RULES` says, the
    latter two where the mesh divides them; the head is gathered along D only. Without a set mesh the result is right
    for any sharding, but XLA gathers a head that is sharded along V.

    Args:
      hidden: float [B, T, D], float32 or bfloat16 (or float64); position t scores `targets[b, t]`.
      head: float [D, V], in the dtype of hidden.
      targets: int [B, T] in [0, V). Out of range the log-probability is NaN.
      temperature: the temperature that the responses were sampled with; positive.
      entropy_gradient: if true, the entropy is differentiable.
      block_columns: columns of a block, for tests. By default chosen from the shapes.

    Returns:
      `TokenScores`; differentiable (reverse mode) in hidden and head.

    Raises:
      ValueError: on shapes that do not fit each other or the mesh, or a temperature or block that is not positive.
      TypeError: on targets that are not integers, or hidden and head that are not of one floating dtype.
    """
    _check(hidden, head, targets, temperature, block_columns)
    settings = _Settings(float(temperature), block_columns, entropy_gradient)
    return _scores(hidden, head, targets.astype(jnp.int32), settings)


def _check(hidden: Array, head: Array, targets: Array, temperature: float, block_columns: int | None) -> None:
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have axes [B, T, D], got shape {hidden.shape}")
    if head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"head has shape {head.shape}, but hidden of shape {hidden.shape} needs [{hidden.shape[-1]}, V]; "
            "transpose a tied embedding of shape [V, D]"
        )
    if head.shape[1] == 0:
        raise ValueError("head has no columns: the vocabulary is empty")
    check_targets(targets, "hidden", hidden)
    if not jnp.issubdtype(hidden.dtype, jnp.floating) or hidden.dtype != head.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and head {head.dtype}; cast both to one floating dtype")
    check_temperature(temperature)
    if block_columns is not None and block_columns < 1:
        raise ValueError(f"block_columns must be positive, got {block_columns}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(hidden: Array, head: Array, targets: Array, settings: _Settings) -> TokenScores:
    return _forward(hidden, head, targets, settings)[0]


def _forward(hidden: Array, head: Array, targets: Array, settings: _Settings) -> tuple[TokenScores, tuple]:
    spread = _spread(_row_sums, "hwt", "tttt", hidden, head, settings)
    sums = _RowSums(*spread(hidden, head, targets))
    log_sum = jnp.log(sums.sum_exp)
    log_probs = sums.target - sums.maximum - log_sum
    log_probs = jnp.where((targets >= 0) & (targets < head.shape[1]), log_probs, jnp.nan)
    entropy = log_sum - sums.weighted / sums.sum_exp
    # The maximum and the log of the sum are kept apart: their sum, the log-sum-exp, would round large logits.
    residuals = (hidden, head, targets, sums.maximum, log_sum)
    return TokenScores(log_probs, entropy), (*residuals, entropy) if settings.entropy_gradient else residuals


def _backward(settings: _Settings, residuals: tuple, gradient: TokenScores) -> tuple[Array, Array, None]:
    hidden, head, *per_token = residuals
    arrays = (*per_token, gradient.log_probs)
    if settings.entropy_gradient:
        *per_token, entropy = per_token
        arrays = (*per_token, gradient.log_probs, gradient.entropy, entropy)
    spread = _spread(_gradients, "hw" + "t" * len(arrays), "hw", hidden, head, settings)
    hidden_gradient, head_gradient = spread(hidden, head, *arrays)
    return hidden_gradient.astype(hidden.dtype), head_gradient, None


_scores.defvjp(_forward, _backward)


def _spread(
    function: Callable[..., Any], inputs: str, outputs: str, hidden: Array, head: Array, settings: _Settings
) -> Callable[..., Any]:
    """Return `function` on each device's own rows and columns of the mesh in use, or `function` itself without a mesh.

    `inputs` and `outputs` have a letter for each array: h is split like hidden, w like the head, t like the targets.
    """
    rows = axes_of("rows")
    tokens, vocabulary = split_axes("tokens", hidden.shape[1]), split_axes("vocabulary", head.shape[1])
    function = functools.partial(function, settings=settings._replace(mesh=_Mesh(rows, tokens, vocabulary)))
    if not free_axes():
        return function
    check_split("hidden", hidden.shape, ("rows", None, None))
    specs = {
        "h": PartitionSpec(rows or None, tokens or None, None),
        "w": PartitionSpec(None, vocabulary or None),
        "t": PartitionSpec(rows or None, tokens or None),
    }
    return on_each_device(
        function,
        tuple(specs[letter] for letter in inputs),
        tuple(specs[letter] for letter in outputs),
    )


class _Blocks(NamedTuple):
    """A division of this device's vocabulary into `number` blocks of `columns` columns.

    The last block is moved left until it fits, so that it overlaps the block before it.
    """

    columns: int
    number: int
    vocab_size: int
    offset: Array | int
    """The id of this device's first column."""

    def start(self, block: Array | int) -> Array | int:
        """Return the first column of a block."""
        return 0 if self.number == 1 else jnp.minimum(block * self.columns, self.vocab_size - self.columns)

    def ids(self, block: Array | int) -> Array:
        """Return the token ids of a block's columns, [1, 1, columns]; −1 for columns of the block before."""
        own = self.start(block) + jnp.arange(self.columns, dtype=jnp.int32)
        return jnp.where(own >= block * self.columns, own + self.offset, -1)[None, None]

    def logits(self, block: Array | int, hidden: Array, head: Array, temperature: float) -> tuple[Array, Array]:
        """Return the block's columns of the head, and its logits [B, T, columns]."""
        part = head
        if self.number > 1:
            # XLA must not move a change of dtype inside the einsum out of the loop, to the whole head: that copy would
            # stay in memory. The barrier keeps it here on the CPU (bfloat16). On TPUs (float32) the product keeps it,
            # as it depends on this turn of the loop; a selection would not.
            head, start = jax.lax.optimization_barrier((head, self.start(block)))
            part = jax.lax.dynamic_slice_in_dim(head, start, self.columns, axis=1)
            part = part * (self.ids(block)[0] >= 0).astype(part.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, part, preferred_element_type=_accumulator(hidden))
        return part, logits if temperature == 1 else logits / temperature


def _blocks(hidden: Array, head: Array, settings: _Settings) -> _Blocks:
    vocab_size = head.shape[1]
    columns = settings.columns or columns_for(hidden.shape[0] * hidden.shape[1], vocab_size)
    columns = min(columns, vocab_size)
    offset = jax.lax.axis_index(settings.mesh.vocabulary) * vocab_size if settings.mesh.vocabulary else 0
    return _Blocks(columns, -(-vocab_size // columns), vocab_size, offset)


def columns_for(num_tokens: int, vocab_size: int) -> int:
    """Return the columns of a block: a small block stays in the cache, but a narrow one wastes the matrix unit."""
    columns = max(MIN_COLUMNS, BLOCK_BYTES // (4 * max(1, num_tokens)) // 128 * 128)
    return min(columns, vocab_size)


def _accumulator(hidden: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32)


def _row_sums(hidden: Array, head: Array, targets: Array, *, settings: _Settings) -> tuple[Array, ...]:
    """Return the `_RowSums` over the whole vocabulary, in one pass."""
    dtype = _accumulator(hidden)
    blocks = _blocks(hidden, head, settings)

    def block_sums(block: Array | int) -> _RowSums:
        _, logits = blocks.logits(block, hidden, head, settings.temperature)
        if blocks.number > 1:
            logits = jnp.where(blocks.ids(block) >= 0, logits, jnp.finfo(dtype).min)
        maximum = jnp.max(logits, axis=-1)
        shifted = logits - maximum[..., None]
        exp = jnp.exp(shifted)
        terms = [exp, exp * shifted]
        if blocks.number == 1:
            sum_exp, weighted = _sum_columns(terms)
            # The target's logit, and 0 where this device has no such column.
            columns = targets - blocks.offset
            inside = (columns >= 0) & (columns < logits.shape[-1])
            picked = jnp.take_along_axis(logits, jnp.where(inside, columns, 0)[..., None], axis=-1)
            return _RowSums(maximum, sum_exp, weighted, jnp.where(inside, picked[..., 0], 0))
        # A gather in every turn of the loop would cost more than one sum more in the same reduction.
        terms.append(jnp.where(blocks.ids(block) == targets[..., None], logits, 0))
        return _RowSums(maximum, *_sum_columns(terms))

    def visit(block: Array | int, sums: _RowSums) -> _RowSums:
        found = block_sums(block)
        maximum = jnp.maximum(sums.maximum, found.maximum)
        before, found = _rescaled(sums, maximum), _rescaled(found, maximum)
        return _RowSums(maximum, *(x + y for x, y in zip(before[1:], found[1:], strict=True)))

    if blocks.number == 1:
        sums = block_sums(0)
    else:
        zeros = jnp.zeros(targets.shape, dtype)
        # A finite start: −inf − (−inf) is not a number.
        start = _RowSums(jnp.full_like(zeros, jnp.finfo(dtype).min), zeros, zeros, zeros)
        sums = jax.lax.fori_loop(0, blocks.number, visit, start)
    if not settings.mesh.vocabulary:
        return tuple(sums)
    sums = _rescaled(sums, jax.lax.pmax(sums.maximum, settings.mesh.vocabulary))
    return sums.maximum, *jax.lax.psum(sums[1:], settings.mesh.vocabulary)


def _sum_columns(terms: list[Array]) -> tuple[Array, ...]:
    """Sum each term over the last axis, in one reduction: several reductions take four times as long on the CPU."""
    return jax.lax.reduce(
        tuple(terms),
        (jnp.zeros((), terms[0].dtype),) * len(terms),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        (terms[0].ndim - 1,),
    )


def _rescaled(sums: _RowSums, maximum: Array) -> _RowSums:
    """Return the same sums relative to another maximum, no smaller than their own."""
    change = sums.maximum - maximum
    factor = jnp.exp(change)
    weighted = factor * (sums.weighted + change * sums.sum_exp)
    return _RowSums(maximum, factor * sums.sum_exp, weighted, sums.target)


def _gradients(
    hidden: Array,
    head: Array,
    targets: Array,
    maximum: Array,
    log_sum: Array,
    *gradients_and_entropy: Array,
    settings: _Settings,
) -> tuple[Array, Array]:
    """Return the gradients of hidden, in the accumulator's dtype, and of the head.

    With x the logits over the temperature, ∂ log p / ∂ x_v = 1[v = target] − p_v, and for the entropy H, where it has a
    gradient, ∂H / ∂x_v = −p_v (log p_v + H).
    """
    dtype = _accumulator(hidden)
    blocks = _blocks(hidden, head, settings)
    gradient, *for_entropy = (array[..., None] for array in gradients_and_entropy)
    gradient = gradient / settings.temperature

    def visit(index: Array | int, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_gradient, head_gradient = gradients
        # From the last block to the first: where two blocks overlap, the one that owns the columns writes them last.
        block = blocks.number - 1 - index
        part, logits = blocks.logits(block, hidden, head, settings.temperature)
        log_probs = logits - maximum[..., None] - log_sum[..., None]
        probs = jnp.exp(log_probs)
        is_target = blocks.ids(block) == targets[..., None]
        logits_gradient = jnp.where(is_target, gradient - gradient * probs, -gradient * probs)
        if for_entropy:
            of_entropy, entropy = for_entropy
            information = jnp.where(probs > 0, log_probs, 0)  # impossible tokens have no share in the entropy
            logits_gradient -= of_entropy / settings.temperature * probs * (information + entropy)
        logits_gradient = logits_gradient.astype(hidden.dtype)
        hidden_gradient += jnp.einsum("btv,dv->btd", logits_gradient, part, preferred_element_type=dtype)
        part_gradient = jnp.einsum("btd,btv->dv", hidden, logits_gradient, preferred_element_type=dtype)
        part_gradient = part_gradient.astype(head.dtype)
        if blocks.number == 1:
            return hidden_gradient, part_gradient
        start = blocks.start(block)
        return hidden_gradient, jax.lax.dynamic_update_slice_in_dim(head_gradient, part_gradient, start, axis=1)

    gradients = (jnp.zeros(hidden.shape, dtype), jnp.zeros_like(head))
    gradients = visit(0, gradients) if blocks.number == 1 else jax.lax.fori_loop(0, blocks.number, visit, gradients)
    hidden_gradient, head_gradient = gradients
    if settings.mesh.vocabulary:
        hidden_gradient = jax.lax.psum(hidden_gradient, settings.mesh.vocabulary)
    if settings.mesh.rows or settings.mesh.tokens:
        head_gradient = jax.lax.psum(head_gradient, (*settings.mesh.rows, *settings.mesh.tokens))
    return hidden_gradient, head_gradient
