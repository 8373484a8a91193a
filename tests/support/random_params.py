"""Random parameters of a model, drawn without compiling its initializer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models


def draw_params(config: models.TransformerConfig) -> dict[str, Any]:
    """Draw float32 parameters of a size that lets every part of a model matter."""
    generator = np.random.default_rng(5)
    shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))

    def draw(path: Any, leaf: Any) -> jax.Array:
        values = generator.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.2 * values)
        return jnp.asarray(values if path[-1].key == "embedding" else 0.25 * values)

    return jax.tree_util.tree_map_with_path(draw, shapes)
