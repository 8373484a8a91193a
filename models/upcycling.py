"""Upcycling: a dense model becomes a mixture of experts that computes the same, to be trained further.

Experts are copies of each layer's feed-forward network, or of its parts, behind a new router (Komatsuzaki et al.,
"Sparse Upcycling", arXiv 2212.05055). All functions are pure, of configurations and parameters.
"""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from models.blocks import fan_in_normal
from models.config import TransformerConfig
from models.hugging_face.families import FAMILIES

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class UpcyclingConfig:
    """Settings for making experts of a feed-forward network."""

    num_experts: int = 8
    """Experts of each layer, E."""
    num_experts_per_token: int = 2
    """Experts that a token activates, K."""
    expert_split: int = 1
    """Number of parts that the hidden width of the feed-forward network is split into; each expert is a copy of one
    part. With as many experts per token as there are parts, a token costs what it cost in the dense model. The parts of
    one copy start with the same router weights, so that at first a token goes through all of them or none ("virtual
    groups", arXiv 2410.07524), and their outputs are scaled up by the number of parts; a power of two changes no
    digit."""
    noise: float = 0.0
    """Standard deviation of the noise added to the experts, relative to that of each matrix. Without noise all copies
    compute the same, so the loss does not depend on the choice among them: the router gets no gradient until the copies
    differ, and they come to differ only through the tokens that each happens to see."""
    router_std: float = 0.02
    """Standard deviation of the new router's weights."""
    shared_expert_size: int = 64
    """Hidden width of the shared expert, where there has to be one: models with biases of queries, keys and values but
    without norms of them (Qwen2, Qwen2.5) become Qwen2-MoE, which always has one. Its output is zero at first."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_token", "expert_split", "shared_expert_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token is {self.num_experts_per_token}, but a layer has only {self.num_experts} "
                "experts: lower the former or raise the latter"
            )
        for name in ("num_experts", "num_experts_per_token"):
            if getattr(self, name) % self.expert_split:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of expert_split ({self.expert_split}), as a "
                    "token goes through all parts of a copy"
                )
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be 0 or more, and finite; got {self.noise}")
        if not 0 < self.router_std < math.inf:  # at 0, all tokens would go to the same experts
            raise ValueError(f"router_std must be more than 0, and finite; got {self.router_std}")


def upcycled_config(config: TransformerConfig, upcycling: UpcyclingConfig = UpcyclingConfig()) -> TransformerConfig:
    """Return the configuration of the mixture of experts that a dense model becomes.

    A family of Hugging Face models can express it. It has a shared expert only if there is no other way.

    Args:
      config: the dense model's configuration.
      upcycling: number and form of the experts.

    Raises:
      ValueError: if the model has experts already, its width cannot be split this way, or no family combines experts
        with its kind of attention.
    """
    if config.num_experts:
        raise ValueError(
            f"the model has {config.num_experts} experts a layer already: only a dense model can be upcycled"
        )
    size, rest = divmod(config.dense_size, upcycling.expert_split)
    if rest:
        raise ValueError(
            f"the feed-forward network's hidden width, {config.dense_size}, is not a multiple of expert_split "
            f"({upcycling.expert_split})"
        )
    without_shared = dataclasses.replace(
        config,
        num_experts=upcycling.num_experts,
        num_experts_per_token=upcycling.num_experts_per_token,
        expert_size=size,
        normalize_expert_weights=True,
        dense_size=0,
        shared_expert_size=0,
        gate_shared_expert=False,
    )
    with_shared = dataclasses.replace(
        without_shared, shared_expert_size=upcycling.shared_expert_size, gate_shared_expert=True
    )
    for candidate in (without_shared, with_shared):
        if any(family.expresses(candidate) for family in FAMILIES.values()):
            return candidate
    raise ValueError(
        f"no family of Hugging Face models ({', '.join(FAMILIES)}) combines experts with this model's attention, so it "
        f"cannot be upcycled: attention_bias {config.attention_bias!r}, query_key_norm {config.query_key_norm!r}, "
        f"windows in {len(config.sliding_layers)} of {config.num_layers} layers (Qwen3-MoE has them in all or in none)"
    )


def upcycle(
    config: TransformerConfig,
    params: dict[str, Any],
    upcycling: UpcyclingConfig = UpcyclingConfig(),
    key: Array | None = None,
) -> dict[str, Any]:
    """Return the parameters of the mixture of experts, for `upcycled_config(config, upcycling)`.

    Without noise its logits are those of the dense model, up to rounding: the weights of the chosen experts sum to 1.
    Parameters that are not copied are shared with `params`. The new ones are made on the default device; to use them
    on a mesh, save them and load them there.

    Args:
      config: the dense model's configuration.
      params: the dense model's parameters.
      upcycling: number and form of the experts.
      key: random key for the router, the noise and the shared expert; that of seed 0 when absent.

    Raises:
      ValueError: as `upcycled_config`.
    """
    target = upcycled_config(config, upcycling)
    (stack,) = config.stacks
    layers = dict(params[stack.name])
    dense = layers.pop("dense")
    chex.assert_shape(dense["down"], (config.num_layers, config.dense_size, config.hidden_size))
    chex.assert_shape(dense["gate_up"], (config.num_layers, config.hidden_size, 2, config.dense_size))
    moe = _all_mixtures(dense, jax.random.key(0) if key is None else key, target, upcycling)
    return {**params, stack.name: {**layers, "moe": moe}}


@functools.partial(jax.jit, static_argnames=("target", "upcycling"))
def _all_mixtures(
    dense: dict[str, Array], key: Array, target: TransformerConfig, upcycling: UpcyclingConfig
) -> dict[str, Any]:
    """Return `moe` of all layers, made one after the other, and copy by copy: noise for all may not fit in memory."""
    keys = jax.random.split(key, target.num_layers)
    return jax.lax.map(lambda layer: _mixture(layer[0], layer[1], target, upcycling), (dense, keys))


def _mixture(
    dense: dict[str, Array], key: Array, target: TransformerConfig, upcycling: UpcyclingConfig
) -> dict[str, Any]:
    """Return `moe` of one layer. Experts of one copy are adjacent, so that even a tie between copies divides none."""
    router_key, gate_up_key, down_key, shared_key = jax.random.split(key, 4)
    parts, hidden_size = upcycling.expert_split, target.hidden_size
    copies = target.num_experts // parts
    gate_up, dtype = dense["gate_up"], dense["gate_up"].dtype
    gate_up = jnp.moveaxis(gate_up.reshape(hidden_size, 2, parts, target.expert_size), 2, 0)
    down = (dense["down"] * parts).reshape(parts, target.expert_size, hidden_size)
    router = upcycling.router_std * jax.random.normal(router_key, (hidden_size, copies), jnp.float32)
    moe: dict[str, Any] = {
        "router": jnp.repeat(router, parts, axis=1).astype(dtype),
        "gate_up": _copied(gate_up, (0, 1, 3), copies, upcycling.noise, gate_up_key),
        "down": _copied(down, (0, 1, 2), copies, upcycling.noise, down_key),
    }
    if target.shared_expert_size:
        width = target.shared_expert_size
        shared_gate_up = fan_in_normal(0)(shared_key, (hidden_size, 2, width), dtype)
        moe["shared"] = {"gate_up": shared_gate_up, "down": jnp.zeros((width, hidden_size), dtype)}
        moe["shared_gate"] = jnp.zeros(hidden_size, dtype)
    return moe


def _copied(parts: Array, matrix_axes: tuple[int, ...], copies: int, noise: float, key: Array) -> Array:
    """Repeat all parts, [P, …], each time with its own noise: [copies · P, …]."""
    if not noise:
        return jnp.tile(parts, (copies,) + (1,) * (parts.ndim - 1))
    std = jnp.std(parts.astype(jnp.float32), axis=matrix_axes, keepdims=True)

    def copy(key: Array) -> Array:
        added = noise * std * jax.random.normal(key, parts.shape, jnp.float32)
        return (parts.astype(jnp.float32) + added).astype(parts.dtype)

    return jax.lax.map(copy, jax.random.split(key, copies)).reshape(-1, *parts.shape[1:])
