"""A Mixture-of-Experts decoder of the Qwen3-MoE architecture, in Flax Linen.

Parameters are a plain nested dict with the layers stacked on a leading axis, the cache is a plain pytree that goes in
and comes out, and the router logits of all layers are an output like any other: nothing is sown, nothing is mutable.
This file must never know a loss, a sampler or a task.

Letters: B rows, T tokens, S cache slots, D hidden size, N heads, K key/value heads, H head size, E experts.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.experts import run_experts
from rspo_jax.types import ModelOutput

Array = jax.Array


class LayerCache(NamedTuple):
    """Keys and values of one layer, or of all layers when stacked on a leading axis."""

    keys: Array
    """[B, S, K, H], rotated."""
    values: Array
    """[B, S, K, H]."""


class Cache(NamedTuple):
    """What decoding remembers of the tokens so far."""

    layers: LayerCache
    """Stacked: [L, B, S, K, H]."""
    segment_ids: Array
    """int32 [B, S]; 0 on padding and on slots that are still empty."""
    length: Array
    """int32 scalar: slots in use."""


class AttentionInputs(NamedTuple):
    """What every layer needs besides its own input."""

    cosine: Array
    """float32 [B, T, 1, H/2]."""
    sine: Array
    """float32 [B, T, 1, H/2]."""
    mask: Array
    """bool [B, 1, T, S]: which slots a token may look at."""
    offset: Array
    """int32 scalar: the slot of the first token."""


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in float32."""

    epsilon: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.dtype(self.param_dtype))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
        return (normed * scale).astype(x.dtype)


def _fan_in_normal(*fan_in_axes: int) -> nn.initializers.Initializer:
    """Normal with variance 1 / (product of the axes that a product sums over)."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:  # pyright: ignore
        fan_in = 1
        for axis in fan_in_axes:
            fan_in *= shape[axis]
        return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

    return init


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, float32 [B, T, 1, H/2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotates the pairs (i, i + H/2) of [B, T, N, H] in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with RMS-normalised queries and keys."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, inputs: AttentionInputs, cache: LayerCache | None) -> tuple[Array, LayerCache | None]:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)

        def project(name: str, heads: int) -> Array:
            kernel = self.param(name, _fan_in_normal(0), (c.hidden_size, heads, c.head_dim), param_dtype)
            return jnp.einsum("btd,dnh->btnh", x, kernel.astype(dtype))

        queries, keys, values = (
            project("query", c.num_heads),
            project("key", c.num_kv_heads),
            project("value", c.num_kv_heads),
        )
        queries = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="query_norm")(queries)
        keys = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="key_norm")(keys)
        queries = rotate(queries, inputs.cosine, inputs.sine)
        keys = rotate(keys, inputs.cosine, inputs.sine)
        if cache is not None:
            start = (0, inputs.offset, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache.keys, keys.astype(cache.keys.dtype), start)
            values = jax.lax.dynamic_update_slice(cache.values, values.astype(cache.values.dtype), start)
            cache = LayerCache(keys, values)
        with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 to float32 inside
            attended = jax.nn.dot_product_attention(queries, keys, values, mask=inputs.mask)
        kernel = self.param("output", _fan_in_normal(0, 1), (c.num_heads, c.head_dim, c.hidden_size), param_dtype)
        return jnp.einsum("btnh,nhd->btd", attended, kernel.astype(dtype)), cache


class MixtureOfExperts(nn.Module):
    """Top-K routing over SwiGLU experts; also returns the router logits."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        router = self.param("router", _fan_in_normal(0), (c.hidden_size, c.num_experts), param_dtype)
        gate_up = self.param(
            "gate_up", _fan_in_normal(1), (c.num_experts, c.hidden_size, 2, c.expert_size), param_dtype
        )
        down = self.param("down", _fan_in_normal(1), (c.num_experts, c.expert_size, c.hidden_size), param_dtype)
        router_logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router.astype(jnp.float32))
        weights, expert_ids = jax.lax.top_k(jax.nn.softmax(router_logits, axis=-1), c.num_experts_per_token)
        if c.normalize_expert_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        rows = x.shape[0] * x.shape[1]
        mixed = run_experts(
            x.reshape(rows, c.hidden_size),
            weights.reshape(rows, -1).astype(dtype),
            expert_ids.reshape(rows, -1),
            gate_up.astype(dtype),
            down.astype(dtype),
        )
        return mixed.reshape(x.shape), router_logits


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants: carry, per-layer input, shared inputs."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, cache: LayerCache | None, inputs: AttentionInputs
    ) -> tuple[Array, tuple[Array, LayerCache | None]]:
        c = self.config
        normed = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="attention_norm")(x)
        attended, cache = Attention(c, name="attention")(normed, inputs, cache)
        x = x + attended
        normed = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="moe_norm")(x)
        mixed, router_logits = MixtureOfExperts(c, name="moe")(normed)
        return x + mixed, (router_logits, cache)


def _scanned_layers(config: TransformerConfig) -> type[nn.Module]:
    layer: type[nn.Module] = Layer
    if config.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        layer = nn.remat(Layer, policy=policy, prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        out_axes=0,
        length=config.num_layers,
    )


class Transformer(nn.Module):
    """Tokens to logits. See `rspo_jax.types.Policy` for the arguments of `apply`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput:
        """Scores the next token at every position.

        Args:
          tokens: int32 [B, T], each in [0, V).
          positions: int32 [B, T]; counted within each segment when absent.
          segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment, 0 is padding. All 1 when absent.
          cache: from `init_cache` or an earlier call; the tokens take its next T slots.

        Returns:
          `logits` float32 [B, T, V], `router_logits` float32 [L, B, T, E], and the cache if one was given.

        Raises:
          ValueError: if the shapes do not fit. Tokens beyond the end of the cache are the caller's mistake: a traced
            length cannot be checked.
        """
        c = self.config
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        _check_inputs(tokens, positions, segment_ids, cache)
        inputs, cache_segment_ids = self._attention_inputs(positions, segment_ids, cache)
        embedding = self.param(
            "embedding",
            nn.initializers.normal(c.hidden_size**-0.5),
            (c.vocab_size, c.hidden_size),
            jnp.dtype(c.param_dtype),
        )
        x = embedding.astype(jnp.dtype(c.dtype))[tokens]
        layers = None if cache is None else cache.layers
        x, (router_logits, layers) = _scanned_layers(c)(c, name="layers")(x, layers, inputs)
        x = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="final_norm")(x)
        if c.tie_embeddings:
            head = embedding.T
        else:
            head = self.param("head", _fan_in_normal(0), (c.hidden_size, c.vocab_size), jnp.dtype(c.param_dtype))
        logits = jnp.einsum("btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        if cache is not None:
            cache = Cache(layers, cache_segment_ids, cache.length + tokens.shape[1])
        return ModelOutput(logits, router_logits, cache)

    def _attention_inputs(
        self, positions: Array | None, segment_ids: Array, cache: Cache | None
    ) -> tuple[AttentionInputs, Array]:
        offset = jnp.int32(0) if cache is None else cache.length
        slot_segment_ids = segment_ids
        if cache is not None:
            slot_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, offset))
        token_slots = offset + jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
        earlier = jnp.arange(slot_segment_ids.shape[1], dtype=jnp.int32)[None, :] <= token_slots[:, None]  # [T, S]
        same = segment_ids[:, :, None] == slot_segment_ids[:, None, :]  # [B, T, S]
        mask = same & earlier[None] & (segment_ids > 0)[:, :, None]
        if positions is None:  # a token's place in its segment is the number of tokens that it sees before itself
            positions = jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1, 0)
        cosine, sine = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return AttentionInputs(cosine, sine, mask[:, None], offset), slot_segment_ids

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `batch_size` rows of at most `length` tokens, in the dtype of the activations."""
        c = self.config
        shape = (c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(c.dtype))
        return Cache(LayerCache(zeros, zeros), jnp.zeros((batch_size, length), jnp.int32), jnp.int32(0))


def _check_inputs(tokens: Array, positions: Array | None, segment_ids: Array, cache: Cache | None) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have axes [B, T], got shape {tokens.shape}")
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}; got {array.shape}")
    if cache is not None:
        rows, slots = cache.segment_ids.shape
        if rows != tokens.shape[0] or slots < tokens.shape[1]:
            raise ValueError(f"a cache of {rows} rows and {slots} slots cannot take tokens of shape {tokens.shape}")


def init_params(config: TransformerConfig, key: Array) -> dict:
    """Fresh parameters: a plain nested dict of arrays in `config.param_dtype`."""
    return _init_params(config, key)


@functools.partial(jax.jit, static_argnames="config")
def _init_params(config: TransformerConfig, key: Array) -> dict:
    return dict(Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"])
