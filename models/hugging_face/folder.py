"""A Hugging Face folder in and out: `load_hf` and `save_hf`.

It must never know a task, a tokenizer or a trainer.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from models.config import DTYPES, TransformerConfig
from models.hugging_face.config_json import OF_THE_WRITER, WITHOUT_EFFECT, Fields, read_config_json
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
"""What goes along from the folder that a model came from: its tokenizer, and how it is meant to generate."""
FLOAT32 = ("correction_bias",)
"""Parameters that are not cast: they are in float32 whatever the others are in."""


def load_config_hf(
    folder: str | os.PathLike[str], dtype: str | None = None, param_dtype: str = "float32"
) -> TransformerConfig:
    """The configuration of the model in a Hugging Face folder.

    Args:
      folder: with a config.json.
      dtype: of activations; by default what config.json says the weights are in (float32 where it says neither that
        nor bfloat16).
      param_dtype: of the parameters.

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
    """Reads a Hugging Face folder, tensor by tensor, straight to where the parameters belong.

    Under a mesh (`jax.set_mesh`) each device gets its own part of them, and each process reads what its devices need;
    without one all of them go to the default device.

    Args:
      folder: config.json, and model.safetensors or its shards with their index.
      dtype: as for `load_config_hf`.
      param_dtype: what the parameters are kept in, whatever the files have.
      remat: of the configuration.
      rules: where parameters lie on the mesh.

    Returns:
      The configuration and the parameters, for `Transformer(config).apply({"params": params}, ...)`.

    Raises:
      ValueError: if config.json or the weights are not what the library supports, or do not fit each other; the first
        tensor that is missing, unexpected or misshapen is named.
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
    # Heads that predict further tokens are stored as layers beyond the last.
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
    """Writes a folder that transformers, vLLM and SGLang load, and `load_hf`.

    In a run of several processes all of them call it, and the first one writes.

    Args:
      folder: absent, or empty.
      config: of the model.
      params: its parameters, on any mesh.
      source: the Hugging Face folder that the model was loaded from, if it was: its tokenizer goes along, and what its
        config.json says beyond the mathematics.
      dtype: of the weights; that of the parameters when absent.

    Raises:
      ValueError: if no family expresses the configuration.
      FileExistsError: if the folder holds something.
    """
    family = family_for(config)
    values, files = ({}, {}) if source is None else _from_source(pathlib.Path(source))
    values |= family.fields_of(config) | {"dtype": jnp.dtype(dtype or params["embedding"].dtype).name}
    files["config.json"] = (json.dumps(values, indent=2) + "\n").encode()
    write_params(folder, plan_of(config, family.names), params, _stored_as(params, dtype), files=files)


def _from_source(source: pathlib.Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a new folder takes over from an older one: fields of config.json that say nothing of the mathematics, and
    small files."""
    kept = WITHOUT_EFFECT - OF_THE_WRITER
    values = {name: value for name, value in read_config_json(source).items() if name in kept}
    paths = (path for pattern in COMPANIONS for path in sorted(source.glob(pattern)))
    return values, {path.name: path.read_bytes() for path in paths if path.is_file()}


def _stored_as(params: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """For each parameter the dtype of its tensors."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.dtype if dtype is None or path[-1].key in FLOAT32 else jnp.dtype(dtype), params
    )
