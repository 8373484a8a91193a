"""Logical axes of every parameter of a model and of its cache, and the parameters that are the router's.

`rspo_jax.sharding.RULES` says how arrays with these axes lie on a mesh.
"""

from typing import Any

import jax

from models.config import TransformerConfig

CACHE_AXES = ("layers", "rows", "attended_heads", None, None)

NORM = {"scale": (None,)}
ROUTER_PARAMS = ("router", "router_bias", "correction_bias")
FEED_FORWARD = {"gate_up": ("embed", None, "dense_hidden"), "down": ("dense_hidden", "embed")}


def model_axes(config: TransformerConfig) -> dict[str, Any]:
    """Return a pytree like that of the parameters, with a tuple of axis names, or None for unsplit axes, for each."""
    axes: dict[str, Any] = {"embedding": ("vocabulary", "embed"), "final_norm": NORM}
    for stack in config.stacks:
        layer: dict[str, Any] = {
            "attention": _attention_axes(config) if config.latent is None else _latent_axes(config),
            "attention_norm": NORM,
            "moe_norm": NORM,
        }
        layer |= {"moe": _mixture_axes(config)} if stack.sparse else {"dense": FEED_FORWARD}
        axes[stack.name] = jax.tree.map(lambda names: ("layers", *names), layer, is_leaf=_is_axes)
    return axes if config.tie_embeddings else axes | {"head": ("embed", "vocabulary")}


def router_mask(config: TransformerConfig) -> dict[str, Any]:
    """Return a pytree of bools like that of the parameters: True for those of the router."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ROUTER_PARAMS, model_axes(config), is_leaf=_is_axes
    )


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _attention_axes(config: TransformerConfig) -> dict[str, Any]:
    axes: dict[str, Any] = {
        "query": ("embed", "heads", None),
        "key": ("embed", "kv_heads", None),
        "value": ("embed", "kv_heads", None),
        "output": ("heads", None, "embed"),
    }
    if config.attention_bias != "none":
        axes |= {"query_bias": ("heads", None), "key_bias": ("kv_heads", None), "value_bias": ("kv_heads", None)}
    if config.attention_bias == "all":
        axes |= {"output_bias": (None,)}
    if config.query_key_norm == "head":
        axes |= {"query_norm": NORM, "key_norm": NORM}
    if config.query_key_norm == "projection":
        axes |= {"query_norm": {"scale": ("heads", None)}, "key_norm": {"scale": ("kv_heads", None)}}
    if config.attention_sinks:
        axes |= {"sinks": ("heads",)}
    return axes


def _latent_axes(config: TransformerConfig) -> dict[str, Any]:
    assert config.latent is not None
    axes: dict[str, Any] = {
        "latent": ("embed", None),
        "latent_norm": NORM,
        "query": ("embed", "heads", None),
        "key": ("embed", "heads", None),
        "value": ("embed", "heads", None),
        "output": ("heads", None, "embed"),
    }
    if config.latent.query_rank:
        axes |= {"query_latent": ("embed", None), "query_latent_norm": NORM}
    return axes


def _mixture_axes(config: TransformerConfig) -> dict[str, Any]:
    axes: dict[str, Any] = {
        "router": ("embed", None),
        "gate_up": ("experts", "expert_embed", None, "expert_hidden"),
        "down": ("experts", "expert_hidden", "expert_embed"),
    }
    if config.router_bias:
        axes |= {"router_bias": (None,)}
    if config.router == "sigmoid":
        axes |= {"correction_bias": (None,)}
    if config.expert_biases:
        axes |= {"gate_up_bias": ("experts", None, "expert_hidden"), "down_bias": ("experts", "expert_embed")}
    if config.shared_expert_size:
        axes |= {"shared": FEED_FORWARD}
    if config.gate_shared_expert:
        axes |= {"shared_gate": ("embed",)}
    return axes
