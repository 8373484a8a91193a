"""Policies that are tables, for tests in which a model is not the point: they compile quickly, and everything that is
computed of them can be written down."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from rspo_jax.types import Array, ModelOutput, RouterReader, RouterReading


def read_layers(reader: RouterReader | None, router_logits: Array | None, experts_per_token: int) -> Any:
    """Return what a reader sees of router logits [L, B, T, E], layer by layer; None without a reader or routers."""

    def read_layer(carry, layer):
        read, layer_logits = layer
        return read(carry, layer_logits, jax.lax.top_k(layer_logits, experts_per_token)[1])

    if reader is None or router_logits is None:
        return None
    return RouterReading(*jax.lax.scan(read_layer, reader.carry, (reader.read, router_logits)))


class StatelessPolicy:
    """The part of the `Policy` protocol that no table needs: the cache holds nothing, and parameters stay as they are.

    A subclass defines `apply`.
    """

    router_score = "softmax"

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, length))

    def repeat_cache(self, cache, repeats):
        return jnp.repeat(cache, repeats, axis=0)

    def cast_params(self, params):
        return params


@dataclass(frozen=True)
class TablePolicy(StatelessPolicy):
    """Logits, and router logits if there is a router, are looked up by the last token alone.

    Parameters are the table of logits [V, V], or {"logits": [V, V], "router": [L, V, E]} with or without the router.
    """

    experts_per_token: int = 2

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None):
        params = variables["params"]
        if not isinstance(params, dict):
            return ModelOutput(params[tokens], None, cache)
        router_logits = params["router"][:, tokens] if "router" in params else None
        reading = read_layers(router_reader, router_logits, self.experts_per_token)
        return ModelOutput(params["logits"][tokens], router_logits, cache, reading=reading)

    def router_params(self):
        return {"logits": False, "router": True}

    def param_axes(self):
        return {"logits": (None, None), "router": (None, None, None)}


class MixturePolicy(StatelessPolicy):
    """A mixture of tables of logits, weighted by the router's probabilities. One expert counts as activated.

    Parameters are {"experts": [E, V, V], "router": [1, V, E]}.
    """

    def apply(self, variables, tokens, positions=None, segment_ids=None, cache=None, router_reader=None):
        params = variables["params"]
        router_logits = params["router"][:, tokens]
        weights = jax.nn.softmax(router_logits[0], axis=-1)
        logits = jnp.einsum("bte,ebtv->btv", weights, params["experts"][:, tokens])
        return ModelOutput(logits, router_logits, cache, reading=read_layers(router_reader, router_logits, 1))

    def init_params(self, key, vocabulary, experts=2):
        keys = jax.random.split(key)
        return {
            "experts": 0.1 * jax.random.normal(keys[0], (experts, vocabulary, vocabulary)),
            "router": jax.random.normal(keys[1], (1, vocabulary, experts)),
        }

    def router_params(self):
        return {"experts": False, "router": True}

    def param_axes(self):
        return {"experts": (None, None, None), "router": (None, None, None)}
