"""Attention with its parameters: grouped-query attention in the variants of the families, and latent attention.

Both write their part of a cache that holds all layers.

Letters: B rows, T tokens, S cache slots, L layers, D hidden size, N heads, K key/value heads, H head size.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import attend, attend_newest
from models.blocks import RMSNorm, fan_in_normal
from models.config import TransformerConfig
from models.rope import logit_scale, rotate, rotate_pairs
from rspo_jax.sharding import spread

Array = jax.Array

LATENT_NORM_EPSILON = 1e-6
"""Epsilon of the norms inside latent attention, whatever the model's own is."""


class LayerCache(NamedTuple):
    """Keys and values of all layers.

    Latent attention keeps the small vectors that both are made from, followed by the rotated part of the keys, in
    `keys` [L, B, 1, S, kv_rank + rotary_dim]; its `values` are empty, [L, B, 1, S, 0].
    """

    keys: Array
    """[L, B, K, S, H], rotated."""
    values: Array
    """[L, B, K, S, H]."""


class AttentionInputs(NamedTuple):
    """Inputs of attention that are the same in every layer."""

    cosine: Array
    """float32 [B, T, 1, H/2]."""
    sine: Array
    """float32 [B, T, 1, H/2]."""
    segment_ids: Array
    """int32 [B, T]."""
    slot_segment_ids: Array
    """int32 [B, S], those of the cache with these tokens in it; without a cache the same as `segment_ids`."""
    first_slot: Array | None
    """int32 scalar, the slot of the cache that takes the first of these tokens. None without a cache."""


NO_WINDOW = jnp.iinfo(jnp.int32).max


class Variant(NamedTuple):
    """Options of a layer's attention, as for `models.attention.attend`."""

    window: int | None = None
    """Window of a layer that slides."""
    slides: Array | None = None
    """bool scalar, True if this layer slides, where layers of one stack differ; None: each with a window does."""
    sinks: Array | None = None
    scale: float | None = None


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        index: Array,
        cache: LayerCache | None,
        inputs: AttentionInputs,
        slides: Array | None = None,
    ) -> tuple[Array, LayerCache | None]:
        """Attend within a layer.

        Args:
          x: [B, T, D].
          index: int32 scalar, the place of this layer in the cache.
          cache: the cache of all layers, if there is one.
          inputs: the inputs that all layers share.
          slides: bool scalar, True if this layer slides; None if all layers slide or none does.

        Returns:
          [B, T, D], and the cache with these tokens in it.
        """
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        zeros = nn.initializers.zeros_init()

        def project(name: str, heads: int) -> Array:
            kernel = self.param(name, fan_in_normal(0), (c.hidden_size, heads, c.head_dim), param_dtype)
            projected = jnp.einsum("btd,dnh->btnh", x, kernel.astype(dtype))
            if c.attention_bias == "none":
                return projected
            bias = self.param(f"{name}_bias", zeros, (heads, c.head_dim), param_dtype)
            return projected + bias.astype(dtype)[None, None]

        queries, keys, values = (
            project("query", c.num_heads),
            project("key", c.num_kv_heads),
            project("value", c.num_kv_heads),
        )
        if c.query_key_norm != "none":
            axes = 1 if c.query_key_norm == "head" else 2
            queries = RMSNorm(c.rms_norm_epsilon, c.param_dtype, axes, name="query_norm")(queries)
            keys = RMSNorm(c.rms_norm_epsilon, c.param_dtype, axes, name="key_norm")(keys)
        if c.clip_qkv:
            queries, keys, values = (jnp.clip(array, -c.clip_qkv, c.clip_qkv) for array in (queries, keys, values))
        queries = rotate(queries, inputs.cosine, inputs.sine)
        keys = rotate(keys, inputs.cosine, inputs.sine)
        variant = Variant(c.sliding_window or None, slides)
        if c.attention_sinks:
            sinks = self.param("sinks", zeros, (c.num_heads,), param_dtype)
            variant = variant._replace(sinks=sinks.astype(jnp.float32))
        attended, cache = _attend(queries, keys, values, index, cache, inputs, variant)
        kernel = self.param("output", fan_in_normal(0, 1), (c.num_heads, c.head_dim, c.hidden_size), param_dtype)
        output = jnp.einsum("btnh,nhd->btd", attended, kernel.astype(dtype))
        if c.attention_bias == "all":
            output = output + self.param("output_bias", zeros, (c.hidden_size,), param_dtype).astype(dtype)[None, None]
        return output, cache


class LatentAttentionLayer(nn.Module):
    """Causal attention whose keys and values are made from one small vector a token (DeepSeek-V2, arXiv 2405.04434).

    Decoding never makes the keys and values of earlier tokens again: it applies the key projection to the query, and
    the value projection to the result of attention (section 2.1.2). Arguments are those of `Attention`.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        index: Array,
        cache: LayerCache | None,
        inputs: AttentionInputs,
        slides: Array | None = None,
    ) -> tuple[Array, LayerCache | None]:
        c, latent = self.config, self.config.latent
        assert latent is not None and slides is None
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)

        def kernel(name: str, shape: tuple[int, ...], *fan_in_axes: int) -> Array:
            return self.param(name, fan_in_normal(*fan_in_axes), shape, param_dtype).astype(dtype)

        def norm(name: str, array: Array) -> Array:
            return RMSNorm(LATENT_NORM_EPSILON, c.param_dtype, name=name)(array)

        queries = x
        if latent.query_rank:
            down = kernel("query_latent", (c.hidden_size, latent.query_rank), 0)
            queries = norm("query_latent_norm", jnp.einsum("btd,dq->btq", x, down))
        query = kernel("query", (queries.shape[-1], c.num_heads, c.head_dim), 0)
        queries = jnp.einsum("btq,qnh->btnh", queries, query)
        plain, rotated = jnp.split(queries, [latent.plain_dim], axis=-1)
        rotated = rotate_pairs(rotated, inputs.cosine, inputs.sine)

        down = kernel("latent", (c.hidden_size, latent.kv_rank + latent.rotary_dim), 0)
        vector, rotary_key = jnp.split(jnp.einsum("btd,dc->btc", x, down), [latent.kv_rank], axis=-1)
        rotary_key = rotate_pairs(rotary_key[:, :, None], inputs.cosine, inputs.sine)
        vectors = jnp.concatenate([norm("latent_norm", vector)[:, :, None], rotary_key], axis=-1)  # [B, T, 1, C + R]

        up = _Up(
            kernel("key", (latent.kv_rank, c.num_heads, latent.plain_dim), 0),
            kernel("value", (latent.kv_rank, c.num_heads, latent.value_dim), 0),
        )
        variant = Variant(scale=logit_scale(c.head_dim, c.rope_scaling))
        if cache is None:
            queries = jnp.concatenate([plain, rotated], axis=-1)
            attended, _ = _attend(queries, *up.keys_and_values(vectors), index, None, inputs, variant)
        else:
            attended, cache = _attend_latent(plain, rotated, vectors, up, index, cache, inputs, variant)
        output = kernel("output", (c.num_heads, latent.value_dim, c.hidden_size), 0, 1)
        return jnp.einsum("btnv,nvd->btd", attended, output), cache


class _Up(NamedTuple):
    """The projections from small vectors to keys and values."""

    key: Array
    """[C, N, P]."""
    value: Array
    """[C, N, V]."""

    def keys_and_values(self, vectors: Array) -> tuple[Array, Array]:
        """Return keys and values, [B, S, 1, C + R] -> [B, S, N, P + R] and [B, S, N, V]."""
        vector, rotary_key = jnp.split(vectors[:, :, 0], [self.key.shape[0]], axis=-1)
        plain = jnp.einsum("bsc,cnp->bsnp", vector, self.key)
        shared = jnp.broadcast_to(rotary_key[:, :, None], (*plain.shape[:3], rotary_key.shape[-1]))
        return jnp.concatenate([plain, shared], axis=-1), jnp.einsum("bsc,cnv->bsnv", vector, self.value)


def _attend_latent(
    plain: Array,
    rotated: Array,
    vectors: Array,
    up: _Up,
    index: Array,
    cache: LayerCache,
    inputs: AttentionInputs,
    variant: Variant,
) -> tuple[Array, LayerCache]:
    """Attend through a cache of small vectors."""
    assert inputs.first_slot is not None
    cache, kept, _ = _through_cache(cache, index, inputs.first_slot, vectors, vectors[..., :0])  # [B, 1, S, C + R]
    segments = (inputs.segment_ids, inputs.slot_segment_ids)
    if plain.shape[1] > 1:
        keys, values = up.keys_and_values(jnp.swapaxes(kept, 1, 2))
        queries = jnp.concatenate([plain, rotated], axis=-1)
        return attend(queries, keys, values, *segments, inputs.first_slot, scale=variant.scale), cache
    queries = jnp.concatenate([jnp.einsum("btnp,cnp->btnc", plain, up.key), rotated], axis=-1)
    vector_size = up.key.shape[0]
    attended = attend_newest(queries, kept, kept[..., :vector_size], *segments, scale=variant.scale)
    return jnp.einsum("btnc,cnv->btnv", attended, up.value), cache


def _attend(
    queries: Array,
    keys: Array,
    values: Array,
    index: Array,
    cache: LayerCache | None,
    inputs: AttentionInputs,
    variant: Variant,
) -> tuple[Array, LayerCache | None]:
    """Attend, [B, T, N, H], [B, T, K, H] -> [B, T, N, H of values], through the cache if there is one."""
    segments = (inputs.segment_ids, inputs.slot_segment_ids)
    if cache is None:
        return _spread_attend(queries, keys, values, *segments, variant), None
    assert inputs.first_slot is not None
    cache, keys, values = _through_cache(cache, index, inputs.first_slot, keys, values)
    window: Array | int | None = variant.window
    if variant.slides is not None:
        window = jnp.where(variant.slides, jnp.int32(variant.window), NO_WINDOW)
    options = {"window": window, "sinks": variant.sinks, "scale": variant.scale}
    if queries.shape[1] == 1:  # a single token sees all slots of its segment: the ring holds nothing later
        return attend_newest(queries, keys, values, *segments, newest_slot=inputs.first_slot, **options), cache
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    return attend(queries, keys, values, *segments, inputs.first_slot, **options), cache


def _spread_attend(
    queries: Array, keys: Array, values: Array, segments: Array, slot_segments: Array, variant: Variant
) -> Array:
    """Attend without a cache, each device to its own rows and heads."""
    heads, whole = ("rows", None, "attended_heads", None), ("rows", None)
    arrays = {
        "queries": (queries, heads),
        "keys": (keys, heads),
        "values": (values, heads),
        "segment_ids": (segments, whole),
        "slot_segment_ids": (slot_segments, whole),
    }
    if variant.sinks is not None:
        arrays["sinks"] = (variant.sinks, ("attended_heads",))

    def attend_all(window: int | None, *inputs: Array) -> Array:
        sinks = inputs[5] if variant.sinks is not None else None
        return attend(*inputs[:5], sinks=sinks, window=window, scale=variant.scale)

    def run(window: int | None, *inputs: Array) -> Array:
        axes = [axes for _, axes in arrays.values()]
        return spread(functools.partial(attend_all, window), axes, heads, tuple(arrays))(*inputs)

    inputs = [array for array, _ in arrays.values()]
    if variant.slides is None:
        return run(variant.window, *inputs)
    # Two programs, of which a layer runs one: a window that is known when compiling is skipped over, not masked.
    return jax.lax.cond(variant.slides, functools.partial(run, variant.window), functools.partial(run, None), *inputs)


def _through_cache(
    cache: LayerCache, layer: Array, first_slot: Array, keys: Array, values: Array
) -> tuple[LayerCache, Array, Array]:
    """Write keys and values of one layer, [B, T, K, H]; return the cache and all that the layer has, [B, K, S, H]."""

    def write(stack: Array, new: Array) -> Array:
        heads_first = jnp.swapaxes(new, 1, 2)[None].astype(stack.dtype)
        return jax.lax.dynamic_update_slice(stack, heads_first, (layer, 0, 0, first_slot, 0))

    cache = LayerCache(write(cache.keys, keys), write(cache.values, values))
    own = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
    return cache, own(cache.keys), own(cache.values)
