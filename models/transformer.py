"""A Mixture-of-Experts decoder of the Qwen3-MoE architecture, in Flax Linen.

Parameters are a plain nested dict with the layers stacked on a leading axis, the cache is a plain pytree that goes in
and comes out, and the router logits of all layers are an output like any other: nothing is sown, nothing is mutable.
This file must never know a loss, a sampler or a task.

Letters: B rows, T tokens, S cache slots, L layers, D hidden size, N heads, K key/value heads, H head size, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import attend, attend_newest
from models.config import TransformerConfig
from models.expert_parallel import mix_experts, mix_experts_of_layer
from rspo_jax.sharding import axes_of, constrain, free_axes, parts_of, split_axes, spread
from rspo_jax.types import ModelOutput, RouterReader, RouterReading

Array = jax.Array


CACHE_AXES = ("layers", "rows", "attended_heads", None, None)
LAYER_AXES = {
    "attention": {
        "query": ("embed", "heads", None),
        "key": ("embed", "kv_heads", None),
        "value": ("embed", "kv_heads", None),
        "output": ("heads", None, "embed"),
        "query_norm": {"scale": (None,)},
        "key_norm": {"scale": (None,)},
    },
    "attention_norm": {"scale": (None,)},
    "moe_norm": {"scale": (None,)},
    "moe": {
        "router": ("embed", None),
        "gate_up": ("experts", "expert_embed", None, "expert_hidden"),
        "down": ("experts", "expert_hidden", "expert_embed"),
    },
}
"""Logical axes of the parameters of a layer, without the axis of the stack."""


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


class LayerCache(NamedTuple):
    """Keys and values of all layers."""

    keys: Array
    """[L, B, K, S, H], rotated."""
    values: Array
    """[L, B, K, S, H]."""


class Cache(NamedTuple):
    """What decoding remembers: a ring of S slots, in which the newest tokens replace the oldest."""

    layers: LayerCache
    segment_ids: Array
    """int32 [B, S]; 0 on padding and on slots that are still empty."""
    length: Array
    """int32 scalar: tokens written so far; the next one goes to slot `length % S`."""


class ExpertStack(NamedTuple):
    """The experts' projections of all layers, in the dtype of the parameters."""

    gate_up: Array
    """[L, E, D, 2, F]."""
    down: Array
    """[L, E, F, D]."""


class SharedInputs(NamedTuple):
    """What every layer needs besides its own input."""

    cosine: Array
    """float32 [B, T, 1, H/2]."""
    sine: Array
    """float32 [B, T, 1, H/2]."""
    segment_ids: Array
    """int32 [B, T]."""
    slot_segment_ids: Array
    """int32 [B, S] of the cache with these tokens in it; without a cache the same as `segment_ids`."""
    first_slot: Array | None
    """int32 scalar: where the cache takes these tokens. None without a cache."""
    experts: ExpertStack | None = None
    """The projections of all layers, which decoding reads in place. None without a cache."""


class LayerCarry(NamedTuple):
    """What goes from layer to layer."""

    x: Array
    """[B, T, D]."""
    cache: LayerCache | None
    """Carried, not sliced, so that a step writes its own tokens and nothing else."""
    reading: Any
    """Of the router reader."""


class LayerInputs(NamedTuple):
    """What one layer is given of arrays that lead with L."""

    index: Array
    """int32 scalar."""
    read_router: Callable[..., tuple[Any, Any]] | None


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


def _look_up(embedding: Array, tokens: Array) -> Array:
    """Rows of the embedding, [V, D], for tokens [B, T].

    On a mesh each device looks up its own part of every row for the tokens of all devices that hold the other parts,
    and the parts then go to where the tokens are: the embedding itself never moves.
    """
    if not free_axes() or embedding.shape[1] % parts_of("embed"):
        return embedding[tokens]
    split, vocabulary = axes_of("embed"), axes_of("vocabulary")

    def local(embedding: Array, tokens: Array) -> Array:
        tokens = jax.lax.all_gather(tokens, split, tiled=True) if split else tokens
        first = jax.lax.axis_index(vocabulary) * embedding.shape[0] if vocabulary else jnp.int32(0)
        own = (tokens >= first) & (tokens < first + embedding.shape[0])
        x = jnp.where(own[..., None], embedding[jnp.where(own, tokens - first, 0)], 0)
        if split:
            x = jax.lax.all_to_all(x, split, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x, vocabulary) if vocabulary else x

    by_token = "tokens" if split_axes("tokens", tokens.shape[1]) else None
    inputs = (("vocabulary", "embed"), ("rows", by_token))
    return spread(local, inputs, ("rows", by_token, None), ("embedding", "tokens"))(embedding, tokens)


class Attention(nn.Module):
    """Causal grouped-query attention with RMS-normalised queries and keys."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, index: Array, cache: LayerCache | None, inputs: SharedInputs
    ) -> tuple[Array, LayerCache | None]:
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
        if cache is None:
            attended = _spread_attend(queries, keys, values, inputs.segment_ids, inputs.slot_segment_ids)
        else:
            assert inputs.first_slot is not None
            cache, keys, values = _through_cache(cache, index, inputs.first_slot, keys, values)
            segments = (inputs.segment_ids, inputs.slot_segment_ids)
            if x.shape[1] == 1:  # it sees all slots of its segment: the ring holds nothing later
                attended = attend_newest(queries, keys, values, *segments)
            else:
                keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
                attended = attend(queries, keys, values, *segments, inputs.first_slot)
        kernel = self.param("output", _fan_in_normal(0, 1), (c.num_heads, c.head_dim, c.hidden_size), param_dtype)
        return jnp.einsum("btnh,nhd->btd", attended, kernel.astype(dtype)), cache


def _spread_attend(queries: Array, keys: Array, values: Array, segments: Array, slot_segments: Array) -> Array:
    """`attend` on each device's own rows and heads."""
    heads, whole = ("rows", None, "attended_heads", None), ("rows", None)
    names = ("queries", "keys", "values", "segment_ids", "segment_ids")
    spread_attend = spread(attend, (heads, heads, heads, whole, whole), heads, names)
    return spread_attend(queries, keys, values, segments, slot_segments)


def _through_cache(
    cache: LayerCache, layer: Array, first_slot: Array, keys: Array, values: Array
) -> tuple[LayerCache, Array, Array]:
    """Writes the keys and values of one layer, [B, T, K, H], and gives back all that the layer has, [B, K, S, H]."""

    def write(stack: Array, new: Array) -> Array:
        heads_first = jnp.swapaxes(new, 1, 2)[None].astype(stack.dtype)
        return jax.lax.dynamic_update_slice(stack, heads_first, (layer, 0, 0, first_slot, 0))

    cache = LayerCache(write(cache.keys, keys), write(cache.values, values))
    own = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
    return cache, own(cache.keys), own(cache.values)


class MixtureOfExperts(nn.Module):
    """Top-K routing over SwiGLU experts; also returns the router logits."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, layer: Array | None = None, stack: ExpertStack | None = None
    ) -> tuple[Array, Array, Array]:
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
        arguments = (x, weights.astype(dtype), expert_ids)
        if stack is None:
            mixed = mix_experts(*arguments, gate_up.astype(dtype), down.astype(dtype))
        else:
            assert layer is not None
            mixed = mix_experts_of_layer(*arguments, *stack, layer)
        return mixed, router_logits, expert_ids


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants: carry, per-layer input, shared inputs."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carry: LayerCarry, layer: LayerInputs, inputs: SharedInputs
    ) -> tuple[LayerCarry, tuple[Array, Any]]:
        c = self.config
        x, cache, reading = carry
        x = constrain(x, "rows", "tokens", None)
        normed = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="attention_norm")(x)
        attended, cache = Attention(c, name="attention")(normed, layer.index, cache, inputs)
        x = x + attended
        normed = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="moe_norm")(x)
        mixed, router_logits, expert_ids = MixtureOfExperts(c, name="moe")(normed, layer.index, inputs.experts)
        layer_reading = None
        if layer.read_router is not None:
            reading, layer_reading = layer.read_router(reading, router_logits, expert_ids)
        x = constrain(x + mixed, "rows", "tokens", None)
        return LayerCarry(x, cache, reading), (router_logits, layer_reading)


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
        router_reader: RouterReader | None = None,
    ) -> ModelOutput:
        """Scores the next token at every position.

        Args:
          tokens: int32 [B, T], each in [0, V).
          positions: int32 [B, T]; counted within each segment when absent.
          segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment, 0 is padding. All 1 when absent.
          cache: from `init_cache` or an earlier call; the tokens take its next T slots. A single token may take the
            slot of the oldest; several must not run over the end of the ring, which cannot be checked in a traced
            length.
          router_reader: sees the router logits and the chosen experts of each layer.

        Returns:
          `logits` float32 [B, T, V], `router_logits` float32 [L, B, T, E], `hidden` and `head`, and the cache and the
          reading where asked for.

        Raises:
          ValueError: if the shapes do not fit.
        """
        c = self.config
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        _check_inputs(tokens, positions, segment_ids, cache)
        inputs = self._shared_inputs(positions, segment_ids, cache)
        if tokens.shape[1] == 1 and cache is not None and not self.is_initializing():
            moe = self.variables["params"]["layers"]["moe"]
            inputs = inputs._replace(experts=ExpertStack(moe["gate_up"], moe["down"]))
        embedding = self.param(
            "embedding",
            nn.initializers.normal(c.hidden_size**-0.5),
            (c.vocab_size, c.hidden_size),
            jnp.dtype(c.param_dtype),
        )
        x = constrain(_look_up(embedding.astype(jnp.dtype(c.dtype)), tokens), "rows", "tokens", None)
        reader = RouterReader(None) if router_reader is None else router_reader  # pyright: ignore[reportArgumentType]
        carry = LayerCarry(x, None if cache is None else cache.layers, reader.carry)
        layers = LayerInputs(jnp.arange(c.num_layers, dtype=jnp.int32), reader.read)
        carry, (router_logits, readings) = _scanned_layers(c)(c, name="layers")(carry, layers, inputs)
        hidden = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="final_norm")(carry.x)
        if c.tie_embeddings:
            head = embedding.T
        else:
            head = self.param("head", _fan_in_normal(0), (c.hidden_size, c.vocab_size), jnp.dtype(c.param_dtype))
        head = head.astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        if cache is not None:
            assert carry.cache is not None
            cache = Cache(carry.cache, inputs.slot_segment_ids, cache.length + tokens.shape[1])
        reading = None if router_reader is None else RouterReading(carry.reading, readings)
        return ModelOutput(logits, router_logits, cache, hidden, head, reading)

    def _shared_inputs(self, positions: Array | None, segment_ids: Array, cache: Cache | None) -> SharedInputs:
        first_slot, slot_segment_ids = None, segment_ids
        if cache is not None:
            first_slot = cache.length % cache.segment_ids.shape[1]
            slot_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, first_slot))
        if positions is None:  # a token's place in its segment is the number of tokens that it sees before itself
            same = segment_ids[:, :, None] == slot_segment_ids[:, None, :]  # [B, T, S], summed as it is made
            if segment_ids.shape[1] > 1:
                slots = jnp.arange(slot_segment_ids.shape[1], dtype=jnp.int32)
                own = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) + (0 if first_slot is None else first_slot)
                same = same & (slots[None, :] <= own[:, None])[None]
            positions = jnp.sum(same, axis=-1, dtype=jnp.int32) - 1
        cosine, sine = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return SharedInputs(cosine, sine, segment_ids, slot_segment_ids, first_slot)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `batch_size` rows of at most `length` tokens, in the dtype of the activations."""
        c = self.config
        shape = (c.num_layers, batch_size, c.num_kv_heads, length, c.head_dim)
        zeros = constrain(jnp.zeros(shape, jnp.dtype(c.dtype)), *CACHE_AXES)
        segment_ids = constrain(jnp.zeros((batch_size, length), jnp.int32), "rows", None)
        return Cache(LayerCache(zeros, zeros), segment_ids, jnp.int32(0))

    def repeat_cache(self, cache: Cache, repeats: int) -> Cache:
        """A cache in which each row of `cache` stands `repeats` times in a row, for several responses to one prompt."""
        rows = jnp.arange(cache.segment_ids.shape[0] * repeats, dtype=jnp.int32) // repeats
        layers = jax.tree.map(lambda leaf: constrain(leaf[:, rows], *CACHE_AXES), cache.layers)
        return Cache(layers, constrain(cache.segment_ids[rows], "rows", None), cache.length)

    def cast_params(self, params: dict) -> dict:
        """The parameters in the dtype of the activations, but for routers and norms, which are read in their own."""
        dtype = jnp.dtype(self.config.dtype)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if path[-1].key in ("router", "scale") else leaf.astype(dtype), params
        )

    def param_axes(self) -> dict:
        """The logical axes of every parameter (`rspo_jax.sharding.RULES`), in a pytree like that of the parameters."""
        axes = {
            "embedding": ("vocabulary", "embed"),
            "final_norm": {"scale": (None,)},
            "layers": jax.tree.map(lambda names: ("layers", *names), LAYER_AXES, is_leaf=_is_axes),
        }
        return axes if self.config.tie_embeddings else axes | {"head": ("embed", "vocabulary")}


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
    # As many rows as a mesh in use wants; XLA drops what they go through.
    tokens = jnp.zeros((parts_of("rows"), 1), jnp.int32)
    return dict(Transformer(config).init(key, tokens)["params"])
