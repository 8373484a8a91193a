"""Auxiliary losses of the routers: load balance and router z-loss, added up layer by layer while the model runs.

    load balance   E · Σ_e f_e · P_e, the mean over layers
    z-loss         (log Σ_e exp logit_e)², the mean over tokens and layers

Sources: load balance of Fedus et al., "Switch Transformers", arXiv 2101.03961, eqs. 4–6, and for sigmoid routers
DeepSeek-V3, arXiv 2412.19437, section 2.1.2, eqs. 17–20. Router z-loss of Zoph et al., "ST-MoE: Designing Stable and
Transferable Sparse Expert Models", arXiv 2202.08906, eq. 5.

f_e is the share of all slots that expert e was given, P_e its mean probability, both over all real tokens of the
mini-batch, prompts included. Through f_e there is no gradient, so it can be taken from the *old* route of the whole
mini-batch, which is this library's own choice: then micro-batches add up to the whole exactly, and on the first,
on-policy update it is what Switch computes. With f_e a share of slots, perfect balance gives 1 whatever K is (Hugging
Face's value is K times this). With the mean over layers, a coefficient means the same at any depth (a sum over layers
is L times this).

Each loss is a `RouterReader`, and `router_loss_of` turns its reading into the loss, before its division. An objective
has another denominator, so what is added to its undivided loss is coefficient · loss · (the objective's weight / real
tokens), both of the whole mini-batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rspo_jax.statistics import Mean, at_least_float32, masked_mean
from rspo_jax.types import Array, RouterReader, RouterReading, RouterScore, check_choice


class LayerSum(NamedTuple):
    """The carry of both readers: the sum over the layers so far."""

    values: Array
    """float32 [B, T], the loss of each token."""
    layers: Array
    """float32 scalar, the number of layers."""


def expert_fractions(expert_ids: Array, segment_ids: Array, num_experts: int) -> Array:
    """Return f, the share of slots that each expert was given in each layer (Switch, arXiv 2101.03961, eqs. 4–6).

    Args:
      expert_ids: int [..., N, L, K, T], of the old route (`RouterTrace`); leading axes, for example of micro-batches,
        are counted together.
      segment_ids: int [..., N, T] of the rows; 0 is padding and does not count.
      num_experts: E.

    Returns:
      float32 [L, E]; each layer sums to 1, or is 0 where nothing is real.

    Raises:
      ValueError: if the route covers other rows.
    """
    covered = (*expert_ids.shape[:-3], expert_ids.shape[-1])
    if covered != segment_ids.shape:
        raise ValueError(f"the old route covers [..., N, T] = {covered}, the rows {segment_ids.shape}: score the same")
    real = (segment_ids != 0)[..., None, None, :]
    expert_ids = jnp.moveaxis(jnp.where(real, expert_ids.astype(jnp.int32), -1), -3, 0)
    experts = jnp.arange(num_experts, dtype=jnp.int32).reshape(-1, *(1,) * (expert_ids.ndim - 1))

    def count(layer: Array) -> Array:
        return jnp.sum(layer[None] == experts, axis=tuple(range(1, experts.ndim)), dtype=jnp.int32)

    counts = jax.lax.map(count, expert_ids).astype(jnp.float32)
    return counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)


def load_balance_reader(fractions: Array, rows: tuple[int, ...], score: RouterScore = "softmax") -> RouterReader:
    """Return a reader that adds up E · Σ_e f_e · p_e of each token over the layers.

    Sources: Switch Transformers, arXiv 2101.03961, eqs. 4–6. For sigmoid routers, where p_e = σ(logit_e) / Σ_j
    σ(logit_j), DeepSeek-V3, arXiv 2412.19437, eqs. 17–20; DeepSeek-V3 balances each sequence, this the mini-batch.

    Args:
      fractions: float32 [L, E] from `expert_fractions`.
      rows: [B, T], the shape of the rows that the model is given.
      score: function that the model's routers make scores with.

    Raises:
      ValueError: if the score is unknown.
    """
    check_choice("score", score, RouterScore)
    fractions = jax.lax.stop_gradient(fractions)
    start = LayerSum(jnp.zeros(rows, jnp.float32), jnp.float32(0))
    return RouterReader(jax.tree_util.Partial(_balance_reads(score), fractions), start)


def z_loss_reader(rows: tuple[int, ...], score: RouterScore = "softmax") -> RouterReader:
    """Return a reader that adds up (log Σ_e exp logit_e)² of each token over the layers.

    Source: router z-loss, ST-MoE, arXiv 2202.08906, eq. 5.

    Args:
      rows: [B, T], the shape of the rows that the model is given.
      score: function that the model's routers make scores with.

    Raises:
      ValueError: for sigmoid routers, which have no normalizer to keep small, or if the score is unknown.
    """
    check_choice("score", score, RouterScore)
    if score == "sigmoid":
        raise ValueError("the router z-loss is for softmax routers, and this model's are sigmoid: leave it out")
    start = LayerSum(jnp.zeros(rows, jnp.float32), jnp.float32(0))
    return RouterReader(jax.tree_util.Partial(_read_z_loss), start)


def router_loss_of(reading: RouterReading, segment_ids: Array) -> Mean:
    """Return the loss that either reader has added up, before its division by the number of real tokens.

    For micro-batches, add up totals and weights and divide once.

    Args:
      reading: the result of `load_balance_reader` or `z_loss_reader`.
      segment_ids: int [B, T] of the rows; 0 is padding and does not count.

    Returns:
      The mean over real tokens of the mean over layers; its weight is the number of real tokens.
    """
    chex.assert_equal_shape([reading.carry.values, segment_ids])
    return masked_mean(reading.carry.values / reading.carry.layers, segment_ids != 0)


# Cached, because a reader is compared by the identity of its function.
@functools.cache
def _balance_reads(score: RouterScore) -> Callable[..., Any]:
    def read(fractions: Array, carry: LayerSum, router_logits: Array, expert_ids: Array) -> tuple[LayerSum, None]:
        del expert_ids  # the old route's count, in `fractions`
        logits = at_least_float32(router_logits)
        if score == "softmax":
            probabilities = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
            probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        per_expert = probabilities * fractions.astype(logits.dtype)[None, None, :]
        return _add(carry, logits.shape[-1] * jnp.sum(per_expert, axis=-1)), None

    return read


def _read_z_loss(carry: LayerSum, router_logits: Array, expert_ids: Array) -> tuple[LayerSum, None]:
    del expert_ids
    return _add(carry, jax.nn.logsumexp(at_least_float32(router_logits), axis=-1) ** 2), None


def _add(carry: LayerSum, values: Array) -> LayerSum:
    return LayerSum(carry.values + values.astype(carry.values.dtype), carry.layers + 1)
