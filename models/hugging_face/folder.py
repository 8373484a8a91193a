"""Loading and saving of Hugging Face folders: `load_hf` and `save_hf`."""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from models.config import DTYPES, TransformerConfig
from models.hugging_face.config_json import WITHOUT_EFFECT, WRITER_FIELDS, Fields, read_config_json
from models.hugging_face.families import family_for, family_of
from models.hugging_face.names import plan_of
from models.hugging_face.reading import read_params
from models.hugging_face.writing import write_params
from models.logical_axes import model_axes
from models.transformer import init_params
from rspo_jax.sharding import RULES, Rules, shardings_of

IGNORED_TENSORS = ("*.rotary_emb.inv_freq",)
COMPANIONS = (
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenization_*.py",
    "tokenizer*.json",
    "vocab.*",
)
"""Files that are copied from the folder that a model came from: its tokenizer and its settings for generation."""
FLOAT32 = ("correction_bias",)
"""Parameters that stay in float32 whatever the dtype of the others."""


def load_config_hf(
    folder: str | os.PathLike[str], dtype: str | None = None, param_dtype: str = "float32"
) -> TransformerConfig:
    """Return the configuration of the model in a Hugging Face folder.

    Args:
      folder: the folder, which holds a config.json.
      dtype: dtype of the activations; by default the one that config.json gives for the weights, or float32 where it
        gives neither float32 nor bfloat16.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: if there is no config.json, the architecture is none of `FAMILIES`, or a field is not supported.
    """
    return _config_of(read_config_json(folder), dtype, param_dtype)


def _config_of(values: dict[str, Any], dtype: str | None, param_dtype: str) -> TransformerConfig:
    config = family_of(values.get("model_type")).config_of(values)
    stored = values.get("dtype") or values.get("torch_dtype")
    dtype = dtype or (stored if stored in DTYPES else "float32")
    return dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype)


def load_hf(
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    param_dtype: str = "float32",
    remat: str = "none",
    rules: Rules = RULES,
) -> tuple[TransformerConfig, dict[str, Any]]:
    """Read a Hugging Face folder, tensor by tensor, straight to where the parameters belong.

    Under a mesh (`jax.set_mesh`) each device gets its own part of the parameters, and each process reads what its
    devices need. Without one, all parameters go to the default device.

    Args:
      folder: the folder, with config.json, and model.safetensors or its shards with their index.
      dtype: dtype of the activations, as for `load_config_hf`.
      param_dtype: dtype that the parameters are kept in, whatever that of the files.
      remat: the field of the configuration.
      rules: placement of the logical axes on the mesh.

    Returns:
      The configuration and the parameters, for `Transformer(config).apply({"params": params}, ...)`.

    Raises:
      ValueError: if config.json or the weights are not supported, or do not fit each other; the first tensor that is
        missing, unexpected or misshapen is named.
    """
    values = read_config_json(folder)
    config = dataclasses.replace(_config_of(values, dtype, param_dtype), remat=remat)
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        places = shardings_of(mesh, shapes, model_axes(config), rules)
        shapes = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        )
    # Heads for further tokens are stored as layers beyond the last.
    further = Fields(values).take("num_nextn_predict_layers", 0)
    beyond = tuple(f"model.layers.{config.num_layers + number}.*" for number in range(further))
    plan = plan_of(config, family_of(values["model_type"]).names)
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    return config, read_params(folder, plan, shapes, (*IGNORED_TENSORS, *beyond, *tied))


def save_hf(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    params: dict[str, Any],
    source: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
) -> None:
    """Write a folder that transformers, vLLM, SGLang and `load_hf` can load.

    In a run of several processes all of them call it, and the first one writes.

    Args:
      folder: the folder to write, absent or empty.
      config: the model's configuration.
      params: the model's parameters, on any mesh.
      source: the Hugging Face folder that the model was loaded from, if any. Its tokenizer is copied, and so are the
        fields of its config.json that do not concern the mathematics.
      dtype: dtype of the weights; that of the parameters when absent.

    Raises:
      ValueError: if no family expresses the configuration.
      FileExistsError: if the folder holds something.
    """
    family = family_for(config)
    values: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if source is not None:
        kept = WITHOUT_EFFECT - WRITER_FIELDS
        values = {name: value for name, value in read_config_json(source).items() if name in kept}
        paths = (path for pattern in COMPANIONS for path in sorted(pathlib.Path(source).glob(pattern)))
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    values |= family.fields_of(config) | {"dtype": jnp.dtype(dtype or params["embedding"].dtype).name}
    files["config.json"] = (json.dumps(values, indent=2) + "\n").encode()
    dtypes = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.dtype if dtype is None or path[-1].key in FLOAT32 else jnp.dtype(dtype), params
    )
    write_params(folder, plan_of(config, family.names), params, dtypes, files=files)
