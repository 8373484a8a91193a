"""The router-shift ratio γ of RSPO: how far the router moved between two policies, per token.

    d_l = (1/K) Σ_k | log r(e_k) − log r_old(e_k) |      e_1..e_K: the experts that the old policy activated in layer l
    Δ   = (1/L) Σ_l d_l                                  γ = exp(−Δ) ∈ (0, 1]

Source: Router-Shift Policy Optimization (RSPO), Zhang et al., "Towards Stable and Effective Reinforcement Learning for
Mixture-of-Experts", arXiv 2510.23027. Both means are inside the exponential. r is the softmax over all experts in
float32, also where the model renormalizes over the chosen ones. Shared experts and layers without experts do not count.

This library's own choices, which the paper does not make:

* For routers that score each expert by a sigmoid (DeepSeek-V3, arXiv 2412.19437), r is that sigmoid, without the bias
  that corrects the choice.
* The old policy is remembered by the ids of its experts and by their log-probabilities on a grid of 1/1024 nat, and the
  current log-probabilities are rounded to the same grid before the two are compared. Rounding both keeps a policy's
  shift against itself at exactly 0 and leaves the mean of many differences right, however small they are (to 1e-5 nat,
  the tolerance below). A slot is off by at most one step of the grid, hence γ by less than 1e-3.

Both directions exist twice: on router logits of all layers together (`trace_router`, `router_shift`), and as readers
that go along with the model's scan over its layers (`trace_reader`, `drift_reader`). Routes can also be used again:
`forced_route_of` turns a trace into a `ForcedRoute`, and `route_reader` records the experts alone. No other file knows
what the arrays of a `RouterTrace` mean.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rspo_jax.sharding import platform
from rspo_jax.statistics import at_least_float32
from rspo_jax.types import Array, ForcedRoute, RouterReader, RouterReading, RouterScore, RouterTrace, check_choice

LayerAggregation = Literal["mean", "sum"]
"""Aggregation of the drifts over layers: their mean (the paper's), or their sum (a plain product of the ratios)."""
LAYER_AGGREGATIONS = get_args(LayerAggregation)
ROUTE_AXES = ("rows", "layers", None, "tokens")
"""Logical axes of both arrays of a `RouterTrace`, and of a recorded route."""
STEPS_PER_NAT = 1024
"""Steps of the grid in a nat. 16 bits reach down to −64 nats; less likely experts are kept as that."""
ROUNDING_TOLERANCE = 0.01
"""Distance, in steps, that does not count. Programs that are compiled apart differ in the last bits, and a
log-probability close to the middle between two grid points must not jump to the next because of that."""


# On the router logits of all layers together


def trace_router(
    router_logits: Array, k: int, score: RouterScore = "softmax", expert_ids: Array | None = None
) -> RouterTrace:
    """Keep what `router_shift` needs of the old policy's router logits.

    Args:
      router_logits: float [L, B, T, E] of the policy that gives `old_log_probs`, at the input positions whose logits
        score the targets.
      k: experts that a token activates, 1 ≤ k ≤ E.
      score: function that turns router logits into r.
      expert_ids: int [L, B, T, K], the experts that the old policy activated; by default the K with the largest logits,
        which is wrong for routers that do not rank by their logits alone.

    Returns:
      The trace; on-policy it makes γ exactly 1.

    Raises:
      ValueError: if the logits do not have four axes, k is out of range, or the score is unknown.
    """
    num_experts = _check_router_logits(router_logits)
    check_choice("score", score, RouterScore)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be between 1 and the number of experts, {num_experts}; got {k}")
    if expert_ids is None:
        _, expert_ids = jax.lax.top_k(at_least_float32(router_logits), k)
    chex.assert_shape(expert_ids, (*router_logits.shape[:-1], k))
    return _swap_rows_and_layers(jax.vmap(functools.partial(_trace_layer, score))(router_logits, expert_ids))


def router_shift(
    router_logits: Array,
    trace: RouterTrace,
    layer_aggregation: LayerAggregation = "mean",
    score: RouterScore = "softmax",
) -> Array:
    """Return the raw router-shift ratio γ of each token, before the floor (RSPO, arXiv 2510.23027; see above).

    Args:
      router_logits: float [L, B, T, E] of the current policy, from the same positions as the trace.
      trace: the old policy's, from `trace_router`.
      layer_aggregation: "mean" over the layers, as in the paper, or "sum".
      score: function that turns router logits into r, the same as for the trace.

    Returns:
      float32 [B, T] in [0, 1]; exactly 1 where the router did not move. It is differentiable as if nothing had been
      rounded to the grid: the losses stop the gradient themselves.

    Raises:
      ValueError: if the shapes do not fit, or the aggregation or the score is unknown.
    """
    _check_router_logits(router_logits)
    check_choice("layer_aggregation", layer_aggregation, LayerAggregation)
    check_choice("score", score, RouterScore)
    expert_ids, log_probs = layers = _swap_rows_and_layers(trace)
    chex.assert_equal_shape([expert_ids, log_probs])
    num_layers, rows, k, tokens = expert_ids.shape
    if k > router_logits.shape[-1]:
        raise ValueError(
            f"the trace keeps {k} experts a token, but the router logits have only {router_logits.shape[-1]}: "
            "trace the same model"
        )
    if (num_layers, rows, tokens) != router_logits.shape[:-1]:
        raise ValueError(
            f"the trace covers [L, B, T] = {(num_layers, rows, tokens)}, the router logits {router_logits.shape[:-1]}: "
            "trace the same batch and the same layers"
        )
    drift = jax.vmap(functools.partial(_layer_drift, score))(router_logits, layers)
    return _gamma(jnp.sum(drift, axis=0), num_layers, layer_aggregation)


def check_covers(trace: RouterTrace, rows: tuple[int, ...]) -> None:
    """Refuse the trace of another batch.

    Raises:
      ValueError: unless the trace covers tokens of shape `rows`, [N, T].
    """
    covered = (trace.expert_ids.shape[0], trace.expert_ids.shape[-1])
    if covered != rows:
        raise ValueError(f"the old route covers [N, T] = {covered}, the rows {rows}: score the same batch")


def forced_route_of(trace: RouterTrace, with_weights: bool = False) -> ForcedRoute:
    """Return the route that makes a model send each token through the experts of the old policy.

    Args:
      trace: the old policy's, of the same tokens.
      with_weights: take the old policy's scores of these experts as well. The trace has rounded them: a score is off by
        a factor of at most exp(1/2048), 0.05 %, and a combine weight that the model divides by the sum of all by at
        most exp(1/1024), 0.1 %. So under the old parameters a forced pass is only nearly the free one. Scores below
        exp(−64) count as exp(−64).

    Returns:
      Expert ids in the dtype of the trace, and float32 weights or None.
    """
    expert_ids, steps = (jnp.transpose(leaf, (1, 0, 3, 2)) for leaf in trace)
    if not with_weights:
        return ForcedRoute(expert_ids)
    return ForcedRoute(expert_ids, jnp.exp(-steps.astype(jnp.float32) / STEPS_PER_NAT))


# As readers, layer by layer. The functions that make them are cached, because a reader is compared by the identity of
# its function.


def trace_reader(score: RouterScore = "softmax") -> RouterReader:
    """Return a reader that keeps what `trace_router` keeps, of the experts that the model itself chose.

    `trace_of` makes the trace of its reading.

    Raises:
      ValueError: if the score is unknown.
    """
    check_choice("score", score, RouterScore)
    return RouterReader(jax.tree_util.Partial(_trace_reads(score)))


def trace_of(reading: RouterReading) -> RouterTrace:
    """Return the trace from a reading of `trace_reader`."""
    return _swap_rows_and_layers(reading.layers)


def drift_reader(trace: RouterTrace, score: RouterScore = "softmax", differentiable: bool = False) -> RouterReader:
    """Return a reader that adds up the drift Σ_l d_l of the current policy against a trace.

    `gamma_of` makes γ of its reading.

    Args:
      trace: the old policy's, of the same tokens.
      score: function that turns router logits into r, the same as for the trace.
      differentiable: if true, γ passes a gradient on to the routers. RSPO's has none (the paper's run without the
        stop-gradient collapses); this is for that ablation.

    Raises:
      ValueError: if the score is unknown.
    """
    check_choice("score", score, RouterScore)
    rows, _, _, tokens = trace.expert_ids.shape
    start = jnp.zeros((rows, tokens), jnp.float32)
    return RouterReader(jax.tree_util.Partial(_drift_reads(score, differentiable), _swap_rows_and_layers(trace)), start)


def gamma_of(reading: RouterReading, trace: RouterTrace, layer_aggregation: LayerAggregation = "mean") -> Array:
    """Return γ, float32 [B, T], from a reading of `drift_reader(trace)`: the value of `router_shift`.

    Raises:
      ValueError: if the aggregation is unknown.
    """
    check_choice("layer_aggregation", layer_aggregation, LayerAggregation)
    return _gamma(reading.carry, trace.expert_ids.shape[1], layer_aggregation)


def route_reader() -> RouterReader:
    """Return a reader that records the experts that each token goes through; `route_of` makes them one array."""
    return RouterReader(jax.tree_util.Partial(_read_route))


def route_of(reading: RouterReading) -> Array:
    """Return the experts of each token, uint8 or uint16 [B, L, K, T], from a reading of `route_reader`."""
    return jnp.swapaxes(reading.layers, 0, 1)


def join_readers(*readers: RouterReader) -> RouterReader:
    """Return one reader in place of several; its carry and its reading are tuples in their order."""
    reads = tuple(reader.read for reader in readers)
    return RouterReader(jax.tree_util.Partial(_read_all, reads), tuple(reader.carry for reader in readers))


@functools.cache
def _trace_reads(score: RouterScore) -> Callable[..., Any]:
    def read(carry: None, router_logits: Array, expert_ids: Array) -> tuple[None, RouterTrace]:
        return carry, _trace_layer(score, router_logits, expert_ids)

    return read


@functools.cache
def _drift_reads(score: RouterScore, differentiable: bool) -> Callable[..., Any]:
    def read(layer: RouterTrace, drift: Array, router_logits: Array, expert_ids: Array) -> tuple[Array, None]:
        del expert_ids  # the experts that the old policy activated count
        logits = router_logits if differentiable else jax.lax.stop_gradient(router_logits)
        return drift + _layer_drift(score, logits, layer).astype(drift.dtype), None

    return read


def _read_route(carry: None, router_logits: Array, expert_ids: Array) -> tuple[None, Array]:
    return carry, _small_ids(router_logits, expert_ids)


def _read_all(
    reads: tuple[Any, ...], carries: tuple[Any, ...], router_logits: Array, expert_ids: Array
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    results = [read(carry, router_logits, expert_ids) for read, carry in zip(reads, carries, strict=True)]
    return tuple(carry for carry, _ in results), tuple(reading for _, reading in results)


# Of one layer


def _trace_layer(score: RouterScore, router_logits: Array, expert_ids: Array) -> RouterTrace:
    """Return the trace of one layer: [B, T, E], [B, T, K] -> [B, K, T]."""
    log_probs = _log_scores_at(score, router_logits, expert_ids)
    steps = jnp.clip(jnp.round(-log_probs * STEPS_PER_NAT), 0, jnp.iinfo(jnp.uint16).max)
    return RouterTrace(_small_ids(router_logits, expert_ids), jnp.swapaxes(steps.astype(jnp.uint16), -1, -2))


def _layer_drift(score: RouterScore, router_logits: Array, trace: RouterTrace) -> Array:
    """Return d_l of one layer: [B, T, E], [B, K, T] -> [B, T]."""
    expert_ids = jnp.swapaxes(trace.expert_ids, -1, -2).astype(jnp.int32)
    current = _log_scores_at(score, router_logits, expert_ids)  # [B, T, K]
    old_steps = jnp.swapaxes(trace.log_probs, -1, -2).astype(current.dtype)
    steps = jnp.minimum(-current * STEPS_PER_NAT, jnp.iinfo(jnp.uint16).max) - old_steps
    moved = jnp.sign(steps) * jnp.round(jnp.maximum(jnp.abs(steps) - ROUNDING_TOLERANCE, 0))
    moved = jax.lax.stop_gradient(moved)
    # The value is that of the grid, the derivative that of |log r − log r_old|.
    straight_through = -jnp.sign(moved) * (current - jax.lax.stop_gradient(current))
    return jnp.mean(jnp.abs(moved) / STEPS_PER_NAT + straight_through, axis=-1)


def _log_scores_at(score: RouterScore, router_logits: Array, expert_ids: Array) -> Array:
    """Return log r at K of E entries, [..., E], [..., K] -> [..., K], without an array of all E."""
    logits = at_least_float32(router_logits)
    if platform() == "tpu":
        # A gather along the last axis is slow there. One sum over E a slot fuses, which it would not on a CPU.
        shape = (*expert_ids.shape, logits.shape[-1])
        is_chosen = expert_ids[..., None] == jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        chosen = jnp.sum(jnp.where(is_chosen, logits[..., None, :], 0), axis=-1)
    else:
        chosen = jnp.take_along_axis(logits, expert_ids, axis=-1, mode="promise_in_bounds")
    if score == "sigmoid":
        return jax.nn.log_sigmoid(chosen)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return (chosen - peak) - jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True))


def _small_ids(router_logits: Array, expert_ids: Array) -> Array:
    """Return the ids in the smallest dtype that holds all experts: [B, T, K] -> [B, K, T]."""
    id_dtype = jnp.uint8 if router_logits.shape[-1] <= 256 else jnp.uint16
    return jnp.swapaxes(expert_ids.astype(id_dtype), -1, -2)


def _gamma(drift: Array, num_layers: int, layer_aggregation: LayerAggregation) -> Array:
    return jnp.exp(-(drift / num_layers if layer_aggregation == "mean" else drift))


def _swap_rows_and_layers(trace: RouterTrace) -> RouterTrace:
    """Turn [L, B, K, T] into [B, L, K, T], or back."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), trace)


def _check_router_logits(router_logits: Array) -> int:
    """Return E of router logits [L, B, T, E]."""
    if router_logits.ndim != 4:
        raise ValueError(f"router_logits must have axes [L, B, T, E], got shape {router_logits.shape}")
    return router_logits.shape[-1]
