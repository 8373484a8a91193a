"""Mixture of experts: the choice of the experts that a token goes through, their weights, and the sum of their results.

`choose_experts` is a pure function of router logits and, where a route is forced, of that route.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.blocks import FeedForward, fan_in_normal
from models.config import TransformerConfig
from models.expert_parallel import mix_experts, mix_experts_of_layer
from models.experts import Experts
from rspo_jax.types import ForcedRoute

Array = jax.Array


class Choice(NamedTuple):
    """The K experts of each token."""

    weights: Array
    """float32 [B, T, K], the factors of their outputs."""
    expert_ids: Array
    """int32 [B, T, K]."""


def choose_experts(
    router_logits: Array,
    config: TransformerConfig,
    correction_bias: Array | None = None,
    forced: ForcedRoute | None = None,
) -> Choice:
    """Choose the experts that each token activates.

    A softmax router takes the K most probable experts; divided by their sum, their weights are the softmax over their
    logits alone. A sigmoid router (DeepSeek-V3, arXiv 2412.19437, equations 12 to 16) ranks experts by score plus
    correction, takes the groups whose two best experts have the largest sum, and in them the K best experts; the
    correction does not enter the weights.

    Args:
      router_logits: float32 [B, T, E], the router's bias included.
      config: the model's configuration, whose `router` names the kind of router.
      correction_bias: float32 [E], for a sigmoid router.
      forced: experts [B, T, K] to take instead. Groups and correction then have no effect, and the weights are made
        from the scores of these experts, unless they come with weights of their own.
    """
    c = config
    expert_ids, weights = (None, None) if forced is None else (forced.expert_ids.astype(jnp.int32), forced.weights)
    if c.router == "sigmoid" and weights is None:
        if expert_ids is None:
            assert correction_bias is not None
            ranks = jax.lax.stop_gradient(jax.nn.sigmoid(router_logits) + correction_bias[None, None, :])
            _, expert_ids = jax.lax.top_k(_of_best_groups(ranks, c), c.num_experts_per_token)
        log_scores = jax.nn.log_sigmoid(jnp.take_along_axis(router_logits, expert_ids, axis=-1))
        # Sigmoids divided by their sum; K of them may all be 0 in float32, but not their logarithms.
        weights = jax.nn.softmax(log_scores, axis=-1) if c.normalize_expert_weights else jnp.exp(log_scores)
    else:
        if weights is None:
            scores = jax.nn.softmax(router_logits, axis=-1)
            if expert_ids is None:
                weights, expert_ids = jax.lax.top_k(scores, c.num_experts_per_token)
            else:
                weights = jnp.take_along_axis(scores, expert_ids, axis=-1)
        if c.normalize_expert_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if c.expert_weight_scale != 1.0:
        weights = weights * c.expert_weight_scale
    assert expert_ids is not None
    return Choice(weights, expert_ids)


def _of_best_groups(ranks: Array, config: TransformerConfig) -> Array:
    """Set the ranks of experts in groups that a token does not use to −∞, [B, T, E]."""
    groups, used = config.router_groups, config.router_groups_per_token
    if used == groups:
        return ranks
    grouped = ranks.reshape(*ranks.shape[:-1], groups, -1)
    of_group = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    _, best = jax.lax.top_k(of_group, used)
    chosen = jnp.any(best[..., None] == jnp.arange(groups, dtype=best.dtype)[None, None, None, :], axis=-2)
    return jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(ranks.shape)


class MixtureOfExperts(nn.Module):
    """A router with its SwiGLU experts, and the shared expert if there is one."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, layer: Array | None = None, stack: Experts | None = None, forced: ForcedRoute | None = None
    ) -> tuple[Array, Array, Array]:
        """Route each token and mix the outputs of its experts.

        Args:
          x: [B, T, D].
          layer: the index of this layer in `stack`, for decoding.
          stack: the experts of all layers, for decoding.
          forced: the forced route of this layer, if there is one.

        Returns:
          [B, T, D], the router logits float32 [B, T, E] and the expert ids int32 [B, T, K].
        """
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        router = self.param("router", fan_in_normal(0), (c.hidden_size, c.num_experts), param_dtype)
        experts = self._experts(param_dtype)
        router_logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router.astype(jnp.float32))
        if c.router_bias:
            bias = self.param("router_bias", nn.initializers.zeros_init(), (c.num_experts,), param_dtype)
            router_logits = router_logits + bias.astype(jnp.float32)[None, None, :]
        correction = None
        if c.router == "sigmoid":
            correction = self.param("correction_bias", nn.initializers.zeros_init(), (c.num_experts,), jnp.float32)
        weights, expert_ids = choose_experts(router_logits, c, correction, forced)
        if stack is None:
            experts = jax.tree.map(lambda leaf: leaf.astype(dtype), experts)
            mixed = mix_experts(x, weights.astype(dtype), expert_ids, experts, c.activation)
        else:
            assert layer is not None
            mixed = mix_experts_of_layer(x, weights.astype(dtype), expert_ids, stack, layer, c.activation)
        if c.shared_expert_size:
            shared = FeedForward(c.shared_expert_size, c.dtype, c.param_dtype, name="shared")(x)
            if c.gate_shared_expert:
                gate = self.param("shared_gate", fan_in_normal(0), (c.hidden_size,), param_dtype)
                shared = jax.nn.sigmoid(jnp.einsum("btd,d->bt", x, gate.astype(x.dtype)))[..., None] * shared
            mixed = mixed + shared
        return mixed, router_logits, expert_ids

    def _experts(self, param_dtype: jnp.dtype) -> Experts:
        c = self.config
        gate_up = self.param("gate_up", fan_in_normal(1), (c.num_experts, c.hidden_size, 2, c.expert_size), param_dtype)
        down = self.param("down", fan_in_normal(1), (c.num_experts, c.expert_size, c.hidden_size), param_dtype)
        if not c.expert_biases:
            return Experts(gate_up, down)
        zeros = nn.initializers.zeros_init()
        gate_up_bias = self.param("gate_up_bias", zeros, (c.num_experts, 2, c.expert_size), param_dtype)
        return Experts(
            gate_up, down, gate_up_bias, self.param("down_bias", zeros, (c.num_experts, c.hidden_size), param_dtype)
        )
