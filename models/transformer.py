"""A Mixture-of-Experts decoder in Flax Linen: one transformer for all families, which differ by its configuration.

Parameters are a plain nested dict with the layers stacked on a leading axis, the cache is a plain pytree that goes in
and comes out, and the router logits of all layers are an output like any other: nothing is sown, nothing is mutable.

Letters: B rows, T tokens, S cache slots, L layers, D hidden size, N heads, K key/value heads, H head size, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention_layers import Attention, AttentionInputs, LatentAttentionLayer, LayerCache
from models.blocks import FeedForward, RMSNorm, fan_in_normal
from models.config import Stack, TransformerConfig
from models.experts import Experts
from models.logical_axes import CACHE_AXES, model_axes, router_mask
from models.mixture import MixtureOfExperts
from models.rope import rotary_angles
from rspo_jax.sharding import axes_of, constrain, free_axes, parts_of, split_axes, spread
from rspo_jax.types import ForcedRoute, ModelOutput, RouterReader, RouterReading, RouterScore

Array = jax.Array

READ_IN_FLOAT32 = ("router", "router_bias", "correction_bias", "scale", "sinks")
"""Parameters that are read in their own dtype, whatever that of the activations is."""


class Cache(NamedTuple):
    """The state of decoding: a ring of S slots, in which the newest tokens replace the oldest."""

    layers: LayerCache
    segment_ids: Array
    """int32 [B, S]; 0 on padding and on slots that are still empty."""
    length: Array
    """int32 scalar, the number of tokens written so far; the next one goes to slot `length % S`."""


class LayerCarry(NamedTuple):
    """The values that go from layer to layer."""

    x: Array
    """[B, T, D]."""
    cache: LayerCache | None
    """The cache of all layers. Carried, not sliced, so that a step writes its own tokens and nothing else."""
    reading: Any
    """The carry of the router reader."""


class LayerInputs(NamedTuple):
    """The inputs of one layer, or with a leading axis those of all layers of a stack."""

    index: Array
    """int32 scalar, the layer's place among all layers."""
    index_in_stack: Array
    """int32 scalar."""
    slides: Array | None
    """bool scalar; None in a model in which all layers slide or none does."""
    read_router: Callable[..., tuple[Any, Any]] | None
    """The router reader's function; None without a reader, and in layers without experts."""
    forced_route: ForcedRoute | None = None
    """The layer's route, [B, T, K] each; None without one, and in layers without experts."""


class SharedInputs(NamedTuple):
    """The inputs that all layers of a stack share."""

    attention: AttentionInputs
    experts: Experts | None = None
    """The experts of all layers of the stack, in the dtype of the parameters, which decoding reads in place. None for
    anything but decoding."""


def _look_up(embedding: Array, tokens: Array) -> Array:
    """Return the rows of the embedding, [V, D], for tokens [B, T].

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


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants: carry, per-layer input, shared inputs."""

    config: TransformerConfig
    sparse: bool

    @nn.compact
    def __call__(
        self, carry: LayerCarry, layer: LayerInputs, inputs: SharedInputs
    ) -> tuple[LayerCarry, tuple[Array | None, Any]]:
        c = self.config
        x, cache, reading = carry
        x = constrain(x, "rows", "tokens", None)
        normed = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="attention_norm")(x)
        attention = (Attention if c.latent is None else LatentAttentionLayer)(c, name="attention")
        attended, cache = attention(normed, layer.index, cache, inputs.attention, layer.slides)
        x = x + attended
        normed = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="moe_norm")(x)
        router_logits = layer_reading = None
        if self.sparse:
            moe = MixtureOfExperts(c, name="moe")
            mixed, router_logits, expert_ids = moe(normed, layer.index_in_stack, inputs.experts, layer.forced_route)
            if layer.read_router is not None:
                reading, layer_reading = layer.read_router(reading, router_logits, expert_ids)
        else:
            mixed = FeedForward(c.dense_size, c.dtype, c.param_dtype, name="dense")(normed)
        x = constrain(x + mixed, "rows", "tokens", None)
        return LayerCarry(x, cache, reading), (router_logits, layer_reading)


def _scanned_layers(config: TransformerConfig, length: int, is_initializing: bool) -> type[nn.Module]:
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
        length=length,
        # The check traces a layer twice. Random numbers count on that: the second trace draws others than the first.
        check_constancy_invariants=is_initializing,
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
        forced_route: ForcedRoute | None = None,
    ) -> ModelOutput:
        """Score the next token at every position.

        Args:
          tokens: int32 [B, T], each in [0, V).
          positions: int32 [B, T]; counted within each segment when absent.
          segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment, 0 is padding. All 1 when absent.
          cache: the result of `init_cache` or of an earlier call; the tokens take its next T slots. A single token may
            take the slot of the oldest; several must not run over the end of the ring, which cannot be checked while
            its length is traced.
          router_reader: a reader of the router logits and the chosen experts of each layer.
          forced_route: the experts of each token in each layer that has any, in place of those the router would choose.

        Returns:
          `logits` float32 [B, T, V], `router_logits` float32 [L, B, T, E] (None without experts), `hidden` and `head`,
          and the cache and the reading if they were asked for.

        Raises:
          ValueError: if the shapes do not fit.
        """
        c = self.config
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        _check_inputs(c, tokens, positions, segment_ids, cache, forced_route)
        if forced_route is not None:
            forced_route = jax.tree.map(lambda leaf: constrain(leaf, "layers", "rows", "tokens", None), forced_route)
        attention = self._attention_inputs(positions, segment_ids, cache)
        embedding = self.param(
            "embedding",
            nn.initializers.normal(c.hidden_size**-0.5),
            (c.vocab_size, c.hidden_size),
            jnp.dtype(c.param_dtype),
        )
        x = constrain(_look_up(embedding.astype(jnp.dtype(c.dtype)), tokens), "rows", "tokens", None)
        reader = RouterReader(None) if router_reader is None else router_reader  # pyright: ignore[reportArgumentType]
        carry = LayerCarry(x, None if cache is None else cache.layers, reader.carry)
        outputs, sparse_before = [], 0
        decodes = tokens.shape[1] == 1 and cache is not None and not self.is_initializing()
        for stack in c.stacks:
            shared = SharedInputs(attention)
            if decodes and stack.sparse:
                moe = self.variables["params"][stack.name]["moe"]
                biases = moe.get("gate_up_bias"), moe.get("down_bias")
                shared = shared._replace(experts=Experts(moe["gate_up"], moe["down"], *biases))
            layers = _layer_inputs(c, stack, (reader.read, forced_route), sparse_before)
            scanned = _scanned_layers(c, stack.length, self.is_initializing())(c, stack.sparse, name=stack.name)
            carry, output = scanned(carry, layers, shared)
            if stack.sparse:
                outputs.append(output)
                sparse_before += stack.length
        hidden = RMSNorm(c.rms_norm_epsilon, c.param_dtype, name="final_norm")(carry.x)
        if c.tie_embeddings:
            head = embedding.T
        else:
            head = self.param("head", fan_in_normal(0), (c.hidden_size, c.vocab_size), jnp.dtype(c.param_dtype))
        head = head.astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        if cache is not None:
            assert carry.cache is not None
            cache = Cache(carry.cache, attention.slot_segment_ids, cache.length + tokens.shape[1])
        router_logits = readings = None
        if outputs:  # of all stacks with experts, one after the other
            router_logits, readings = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        reading = None if router_reader is None or not outputs else RouterReading(carry.reading, readings)
        return ModelOutput(logits, router_logits, cache, hidden, head, reading)

    def _attention_inputs(self, positions: Array | None, segment_ids: Array, cache: Cache | None) -> AttentionInputs:
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
        c = self.config
        rotated = c.head_dim if c.latent is None else c.latent.rotary_dim
        cosine, sine = rotary_angles(positions, rotated, c.rope_theta, c.rope_scaling)
        return AttentionInputs(cosine, sine, segment_ids, slot_segment_ids, first_slot)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """Return an empty cache for `batch_size` rows of at most `length` tokens, in the dtype of the activations."""
        c = self.config
        sizes = (c.num_kv_heads, c.head_dim, c.head_dim)
        if c.latent is not None:
            sizes = (1, c.latent.kv_rank + c.latent.rotary_dim, 0)
        heads, *last = sizes

        def zeros(size: int) -> Array:
            shape = (c.num_layers, batch_size, heads, length, size)
            return constrain(jnp.zeros(shape, jnp.dtype(c.dtype)), *CACHE_AXES)

        segment_ids = constrain(jnp.zeros((batch_size, length), jnp.int32), "rows", None)
        return Cache(LayerCache(*map(zeros, last)), segment_ids, jnp.int32(0))

    def repeat_cache(self, cache: Cache, repeats: int) -> Cache:
        """Return a cache with each row `repeats` times in a row, for several responses to one prompt."""
        rows = jnp.arange(cache.segment_ids.shape[0] * repeats, dtype=jnp.int32) // repeats
        layers = jax.tree.map(lambda leaf: constrain(leaf[:, rows], *CACHE_AXES), cache.layers)
        return Cache(layers, constrain(cache.segment_ids[rows], "rows", None), cache.length)

    def cast_params(self, params: dict) -> dict:
        """Cast the parameters to the dtype of the activations, except those that are read in their own."""
        dtype = jnp.dtype(self.config.dtype)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if path[-1].key in READ_IN_FLOAT32 else leaf.astype(dtype), params
        )

    def param_axes(self) -> dict:
        """Return a pytree like that of the parameters with the logical axes of each (`rspo_jax.sharding.RULES`)."""
        return model_axes(self.config)

    def router_params(self) -> dict:
        """Return a pytree of bools like that of the parameters: True for those of the routers.

        These are matrix, bias and the correction of the choice. The gate of a shared expert chooses nothing and is not
        one of them.
        """
        return router_mask(self.config)

    @property
    def router_score(self) -> RouterScore:
        """The function that turns router logits into scores, "softmax" or "sigmoid"."""
        return self.config.router


def _layer_inputs(
    config: TransformerConfig, stack: Stack, by_layer: tuple[Any, ForcedRoute | None], sparse_before: int
) -> LayerInputs:
    """Return the inputs of all layers of a stack.

    Args:
      config: the model's configuration.
      stack: the stack.
      by_layer: the router reader's function and the forced route, with leaves that lead with all layers with experts.
      sparse_before: number of layers with experts before the stack.
    """
    places = jnp.arange(stack.length, dtype=jnp.int32)
    slides = None
    if 0 < len(config.sliding_layers) < config.num_layers:
        layers = range(stack.first, stack.first + stack.length)
        slides = jnp.asarray([layer in config.sliding_layers for layer in layers])
    own = slice(sparse_before, sparse_before + stack.length)
    whole = stack.length == config.num_sparse_layers
    read, forced = by_layer if whole else jax.tree.map(lambda leaf: leaf[own], by_layer)
    if not stack.sparse:
        read = forced = None
    return LayerInputs(places + stack.first, places, slides, read, forced)


def _check_inputs(
    config: TransformerConfig,
    tokens: Array,
    positions: Array | None,
    segment_ids: Array,
    cache: Cache | None,
    route: ForcedRoute | None,
) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have axes [B, T], got shape {tokens.shape}")
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the shape of tokens, {tokens.shape}; got {array.shape}")
    if cache is not None:
        rows, slots = cache.segment_ids.shape
        if rows != tokens.shape[0] or slots < tokens.shape[1]:
            raise ValueError(f"a cache of {rows} rows and {slots} slots cannot take tokens of shape {tokens.shape}")
    if route is None:
        return
    if not config.num_sparse_layers:
        raise ValueError("forced_route says which experts to use, but this model has none: leave it out")
    shape = (config.num_sparse_layers, *tokens.shape, config.num_experts_per_token)
    for name, array in zip(route._fields, route, strict=True):
        if array is not None and array.shape != shape:
            raise ValueError(
                f"forced_route.{name} must have axes [L, B, T, K], here {shape}; got {array.shape}: record the route "
                "of the same tokens with the same model"
            )
    if not jnp.issubdtype(route.expert_ids.dtype, jnp.integer):
        raise ValueError(f"forced_route.expert_ids must be integers, got {route.expert_ids.dtype}")
    if route.weights is not None and route.weights.dtype != jnp.float32:
        raise ValueError(f"forced_route.weights must be float32, got {route.weights.dtype}")


@functools.partial(jax.jit, static_argnames="config")
def init_params(config: TransformerConfig, key: Array) -> dict:
    """Return fresh parameters, a plain nested dict of arrays in `config.param_dtype`."""
    # As many rows as the mesh in use asks for; XLA drops the computation that they go through.
    tokens = jnp.zeros((parts_of("rows"), 1), jnp.int32)
    return dict(Transformer(config).init(key, tokens)["params"])
