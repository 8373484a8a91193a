"""Diagnostics of an update beside its loss: how routes moved, how experts are used, and how the ratios spread.

`routing_reader` goes along with the model's scan over its layers, as the drift reader inside it does, and keeps sums
over tokens, nothing as large as the router logits. The other functions turn arrays of the loss into statistics.
`numbers_and_arrays` takes the reduced statistics of a step apart for the record. Nothing here has a gradient of its
own, sorts, or ranks experts a second time.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rspo_jax.statistics import (
    Maximum,
    Means,
    Quantiles,
    Statistic,
    at_least_float32,
    effective_sample_size,
    histogram,
    masked_mean,
)
from rspo_jax.types import Array, RouterReader, RouterReading, RouterScore

PERCENTS = (1, 10, 50, 90, 99)
"""Percents of the quantiles of ratios and drifts."""
DRIFT_EDGES = tuple(float(f"{10 ** (quarter / 4):.4g}") for quarter in range(-16, 5))
"""Edges of the bins of −log γ, in nats: four a decade from 0.0001 to 10, with a bin below (no move) and one above."""
LOG_RATIO_EDGES = (*(-edge for edge in reversed(DRIFT_EDGES)), *DRIFT_EDGES)
"""Edges of the bins of log-ratios: the same to both sides of 0. The bin in the middle holds what did not move."""


class LayerSums(NamedTuple):
    """Sums over the response tokens of each row, of one layer. Rows may lie on different devices without any exchange.

    A reading of all layers leads with L.
    """

    drift: Array
    """float32 [N], sum of d_l, in nats."""
    overlap: Array
    """float32 [N], sum of |old ∩ new| / K."""
    stays: Array
    """float32 [N], number of tokens whose old experts are all active still."""
    entropy: Array
    """float32 [N], sum of the entropy of the router's distribution over all experts, in nats."""
    load: Array
    """int32 [N, E], number of tokens that each expert is active for."""


class RoutingCarry(NamedTuple):
    """The carry of `routing_reader` from layer to layer."""

    drift: Array
    """float32 [N, T], the carry of the drift reader."""
    stays: Array
    """bool [N, T], True where the old experts have all stayed in every layer so far."""
    mask: Array
    """bool [N, T], True on inputs that score a response token."""


def response_inputs(places: Array, mask: Array, rows: tuple[int, ...]) -> Array:
    """Mark the inputs of packed rows that score a response token, the inverse of `rspo_jax.rollouts.packing.unpack`.

    Args:
      places: int32 [B, T] of a `PackedBatch`.
      mask: bool [B, T] of the same batch.
      rows: (N, T), the shape of the rows.

    Returns:
      bool of the shape of the rows.
    """
    size = rows[0] * rows[1]
    flat = jnp.zeros(size, bool).at[jnp.where(mask, places, size)].set(True, mode="drop")
    return flat.reshape(rows)


def routing_reader(
    drift: RouterReader, old_experts: Array, mask: Array, score: RouterScore = "softmax"
) -> RouterReader:
    """Return a reader of how the routes differ from the old ones, with a drift reader inside; see `routing_statistics`.

    Args:
      drift: a `drift_reader`. Through this reader it is computed once for both purposes; its reading is
        `drift_reading`, bit for bit what it would be alone.
      old_experts: uint8 or uint16 [N, L, K, T], `expert_ids` of the old policy's `RouterTrace`.
      mask: bool [N, T] from `response_inputs`. Other tokens count for the drift reader only.
      score: function that turns router logits into scores; the entropy is that of the scores over their sum.

    Returns:
      A reader whose readings have no gradient, except through `drift` where that has one.
    """
    bound = (drift.read, jnp.swapaxes(old_experts, 0, 1))
    carry = RoutingCarry(drift.carry, jnp.ones_like(mask), mask)
    return RouterReader(jax.tree_util.Partial(_routing_reads(score), bound), carry)


def drift_reading(reading: RouterReading) -> RouterReading:
    """Return the reading of the drift reader inside `routing_reader`, for `rspo_jax.routing.shift.gamma_of`."""
    return RouterReading(reading.carry.drift, None)


# Cached, because a reader is compared by the identity of its function.
@functools.cache
def _routing_reads(score: RouterScore) -> Callable[..., Any]:
    def read(
        bound: tuple[Callable[..., Any], Array], carry: RoutingCarry, router_logits: Array, expert_ids: Array
    ) -> tuple[RoutingCarry, LayerSums]:
        read_drift, old = bound  # [N, K, T]
        moved, _ = read_drift(jnp.zeros_like(carry.drift), router_logits, expert_ids)
        logits = jax.lax.stop_gradient(router_logits)
        new = jnp.swapaxes(expert_ids.astype(jnp.int32), -1, -2)  # tokens last, as on a TPU the last axis is padded

        # Number of experts that the two routes share, [N, T].
        new_ids, k = new.astype(old.dtype), old.shape[-2]
        common = sum(
            (jnp.any(old[:, slot, None, :] == new_ids, axis=1).astype(jnp.int32) for slot in range(k)),
            start=jnp.int32(0),
        )
        stays = common == k
        overlap = common.astype(jnp.float32) / k

        # The entropy −Σ p log p of the scores over their sum, [N, T].
        logits = at_least_float32(logits)
        log_scores = jax.nn.log_sigmoid(logits) if score == "sigmoid" else logits
        below = log_scores - jnp.max(log_scores, axis=-1, keepdims=True)
        scores = jnp.exp(below)
        total = jnp.sum(scores, axis=-1)
        entropy = jnp.log(total) - jnp.sum(jnp.where(scores > 0, scores * below, 0), axis=-1) / total

        # Tokens of each expert, [N, E], by comparing: a scatter is slow on a TPU.
        chosen = jnp.where(carry.mask[:, None, :], new, -1)
        experts = jnp.arange(logits.shape[-1], dtype=chosen.dtype)[None, :, None, None]
        load = jnp.sum(chosen[:, None] == experts, axis=(-2, -1), dtype=jnp.int32)

        per_token = (jax.lax.stop_gradient(moved), overlap, stays, entropy)
        sums = [jnp.sum(jnp.where(carry.mask, values.astype(jnp.float32), 0), axis=-1) for values in per_token]
        return carry._replace(drift=carry.drift + moved, stays=carry.stays & stays), LayerSums(*sums, load=load)

    return read


def routing_statistics(reading: RouterReading) -> dict[str, Statistic]:
    """Return the statistics of a reading of `routing_reader`, over the response tokens.

    Args:
      reading: the reading of one batch of rows.

    Returns:
      The statistics by name:

      * `layer_drift` [L]: mean d_l in nats (RSPO, arXiv 2510.23027; `rspo_jax.routing.shift`).
      * `layer_overlap` [L]: mean |old ∩ new| / K of the active experts.
      * `layer_stays` [L]: share of the tokens whose old experts are all active still; and `route_stays`: share of the
        tokens for which this holds in every layer.
      * `layer_router_entropy` [L]: mean entropy of the router in nats; log E without any preference.
      * `expert_load` [L, E]: share of the assignments of each expert; each layer's sum is 1.
    """
    sums, (_, stays, mask) = reading.layers, reading.carry
    tokens = jnp.broadcast_to(jnp.sum(mask, dtype=jnp.float32), sums.drift.shape[:1])
    load = jnp.sum(sums.load, axis=1).astype(jnp.float32)
    assignments = jnp.broadcast_to(jnp.sum(load, axis=-1, keepdims=True), load.shape)
    return {
        "layer_drift": Means(jnp.sum(sums.drift, axis=-1), tokens),
        "layer_overlap": Means(jnp.sum(sums.overlap, axis=-1), tokens),
        "layer_stays": Means(jnp.sum(sums.stays, axis=-1), tokens),
        "layer_router_entropy": Means(jnp.sum(sums.entropy, axis=-1), tokens),
        "expert_load": Means(load, assignments, axes=2),
        "route_stays": masked_mean(stays.astype(jnp.float32), mask),
    }


def max_violation(load: Any) -> np.ndarray:
    """Return max_e load / mean load − 1 of each layer: how far its busiest expert lies above the mean.

    Source: MaxVio, Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664,
    section 4.1, eq. 4.

    Args:
      load: [L, E], reduced shares or counts of assignments.

    Returns:
      float64 [L]; 0 where all experts are used alike, NaN in a layer without assignments.
    """
    load = np.asarray(load, np.float64)
    mean = load.mean(axis=-1)
    return np.divide(load.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0) - 1


def ratio_statistics(
    log_ratio: Array, mask: Array, gamma: Array | None = None, gamma_min: float | None = None
) -> dict[str, Statistic]:
    """Return the statistics of an update's importance ratios and of its router shift.

    Args:
      log_ratio: float32 [B, T], log π_θ − log π_old.
      mask: bool [B, T], True on response tokens.
      gamma: float32 [B, T], raw γ of `rspo_jax.router_shift`; None for a dense model.
      gamma_min: the floor; None where the objective does not weigh tokens by γ.

    Returns:
      * `log_ratio_quantiles` [5], at `PERCENTS`, and `log_ratio_histogram` over `LOG_RATIO_EDGES`.
      * `effective_sample_size`: Kish's, of the ratios w as weights of tokens; a share in (0, 1].
      * with γ, `drift_quantiles` and `drift_histogram` of −log γ in nats, over `DRIFT_EDGES`.
      * with a floor, `shifted_sample_size`: the effective sample size of w·max(γ, floor).
    """
    log_ratio = jax.lax.stop_gradient(at_least_float32(log_ratio))
    percents = jnp.asarray(PERCENTS, jnp.int32)
    statistics: dict[str, Statistic] = {
        "log_ratio_quantiles": Quantiles(log_ratio.astype(jnp.float32), mask, percents),
        "log_ratio_histogram": histogram(log_ratio, mask, LOG_RATIO_EDGES),
        "effective_sample_size": effective_sample_size(log_ratio, mask),
    }
    if gamma is not None:
        drift = -jnp.log(jax.lax.stop_gradient(gamma).astype(log_ratio.dtype))
        drift = jnp.maximum(drift, 0)  # no −0
        statistics["drift_quantiles"] = Quantiles(drift.astype(jnp.float32), mask, percents)
        statistics["drift_histogram"] = histogram(drift, mask, DRIFT_EDGES)
        if gamma_min is not None:
            shifted = log_ratio - jnp.minimum(drift, -float(np.log(gamma_min)))
            statistics["shifted_sample_size"] = effective_sample_size(shifted, mask)
    return statistics


def mismatch_statistics(log_probs: Array, sampler_log_probs: Array, mask: Array) -> dict[str, Statistic]:
    """Return the statistics of the trainer's log-probabilities less the sampler's, under the same parameters.

    Args:
      log_probs: float32 [B, T], the trainer's.
      sampler_log_probs: float32 [B, T].
      mask: bool [B, T], True on response tokens.

    Returns:
      `mismatch_mean` and `mismatch_max` of |trainer − sampler| in nats, and `mismatch_histogram` of the difference
      over `LOG_RATIO_EDGES`.
    """
    gap = jnp.where(mask, log_probs - sampler_log_probs, 0)
    return {
        "mismatch_mean": masked_mean(jnp.abs(gap), mask),
        "mismatch_max": Maximum(jnp.max(jnp.abs(gap))),
        "mismatch_histogram": histogram(gap, mask, LOG_RATIO_EDGES),
    }


def numbers_and_arrays(reduced: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Take the reduced statistics of a step apart into numbers and arrays, and add the ones that follow from them.

    Args:
      reduced: what `rspo_jax.statistics.reduce` returns, on the host.

    Returns:
      The numbers, with the means over layers `drift`, `overlap`, `router_entropy` and `max_violation`; and the arrays,
      with `layer_max_violation` [L] and the edges of the histograms, `log_ratio_edges` and `drift_edges`. Only what
      follows from the statistics at hand is added: those of a dense model without diagnostics give no arrays.
    """
    numbers = {name: float(value) for name, value in reduced.items() if not np.ndim(value)}
    arrays = {name: np.asarray(value) for name, value in reduced.items() if np.ndim(value)}
    if "expert_load" in arrays:
        arrays["layer_max_violation"] = max_violation(arrays["expert_load"])
    for name in ("drift", "overlap", "router_entropy", "max_violation"):
        if f"layer_{name}" in arrays:
            numbers[name] = float(np.mean(arrays[f"layer_{name}"], dtype=np.float64))
    if "log_ratio_histogram" in arrays or "mismatch_histogram" in arrays:
        arrays["log_ratio_edges"] = np.asarray(LOG_RATIO_EDGES)
    if "drift_histogram" in arrays:
        arrays["drift_edges"] = np.asarray(DRIFT_EDGES)
    return numbers, arrays
