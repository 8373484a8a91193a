"""How far the router moved between two policies: RSPO's router-shift ratio γ, per token.

    d_l = (1/K) Σ_k | log r(e_k) − log r_old(e_k) |      e_1..e_K: the experts that the old policy activated in layer l
    Δ   = (1/L) Σ_l d_l                                  γ = exp(−Δ) ∈ (0, 1]

(Router-Shift Policy Optimization, arXiv 2510.23027). r is the softmax over all experts in float32, also where the
model renormalises over the chosen ones. Both means are inside the exponential. This file alone knows what a
`RouterTrace` holds; it must never know a model or a loss.
"""

import chex
import jax
import jax.numpy as jnp

from rspo_jax.precision import at_least_float32
from rspo_jax.types import Array, RouterTrace

LAYER_AGGREGATIONS = ("mean", "sum")


def trace_router(router_logits: Array, k: int) -> RouterTrace:
    """Keeps, of the old policy's router logits, what `router_shift` needs later.

    Args:
      router_logits: float [L, B, T, E] of the policy that gives `old_log_probs`, at the input positions whose logits
        score the targets.
      k: experts that a token activates, 1 ≤ k ≤ E.

    Returns:
      The trace; on-policy it makes γ exactly 1.

    Raises:
      ValueError: if the logits do not have four axes, or k is out of range.
    """
    num_experts = _check_router_logits(router_logits)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be between 1 and the number of experts, {num_experts}; got {k}")
    log_probs, expert_ids = jax.lax.top_k(_log_router_probs(router_logits), k)
    expert_ids = expert_ids.astype(jnp.uint8 if num_experts <= 256 else jnp.uint16)
    return RouterTrace(jnp.moveaxis(expert_ids, 0, 2), jnp.moveaxis(log_probs, 0, 2))


def router_shift(router_logits: Array, trace: RouterTrace, layer_aggregation: str = "mean") -> Array:
    """The raw router-shift ratio γ of each token, before the floor.

    Args:
      router_logits: float [L, B, T, E] of the current policy, from the same positions as the trace.
      trace: `trace_router` of the old policy.
      layer_aggregation: "mean" over the layers (the paper's geometric mean) or "sum" (a plain product).

    Returns:
      float32 [B, T] in [0, 1]; exactly 1 where the router did not move. It is differentiable: the losses stop
      the gradient themselves.

    Raises:
      ValueError: if the shapes do not fit, or the aggregation is unknown.
    """
    _check_router_logits(router_logits)
    if layer_aggregation not in LAYER_AGGREGATIONS:
        raise ValueError(f"layer_aggregation must be one of {LAYER_AGGREGATIONS}, got {layer_aggregation!r}")
    chex.assert_equal_shape([trace.expert_ids, trace.log_probs])
    expert_ids = jnp.moveaxis(trace.expert_ids, 2, 0).astype(jnp.int32)  # [L, B, T, K]
    if expert_ids.shape[-1] > router_logits.shape[-1]:
        raise ValueError(
            f"the trace keeps {expert_ids.shape[-1]} experts a token, but the router logits have only "
            f"{router_logits.shape[-1]}: trace the same model"
        )
    if expert_ids.shape[:-1] != router_logits.shape[:-1]:
        raise ValueError(
            f"the trace covers [L, B, T] = {expert_ids.shape[:-1]}, the router logits {router_logits.shape[:-1]}: "
            "trace the same batch and the same layers"
        )
    log_probs = jnp.take_along_axis(_log_router_probs(router_logits), expert_ids, axis=-1)
    layer_drift = jnp.mean(jnp.abs(log_probs - jnp.moveaxis(trace.log_probs, 2, 0)), axis=-1)  # [L, B, T]
    drift = jnp.mean(layer_drift, axis=0) if layer_aggregation == "mean" else jnp.sum(layer_drift, axis=0)
    return jnp.exp(-drift)


def _log_router_probs(router_logits: Array) -> Array:
    return jax.nn.log_softmax(at_least_float32(router_logits), axis=-1)


def _check_router_logits(router_logits: Array) -> int:
    if router_logits.ndim != 4:
        raise ValueError(f"router_logits must have axes [L, B, T, E], got shape {router_logits.shape}")
    return router_logits.shape[-1]
