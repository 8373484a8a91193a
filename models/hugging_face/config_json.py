"""The fields of a `config.json`, taken one by one: what nobody takes must be known to leave the mathematics alone.

A field that is not understood is refused by name, as a model that runs and is wrong costs more than one that does not
load. This file must never know what a family makes of a field.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from models.rope import RopeScaling

WITHOUT_EFFECT = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "ep_size",
    "experts_per_token",
    "finetuning_task",
    "id2label",
    "initial_context_length",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "num_labels",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "seq_aux",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
}
"""Of these a forward pass knows nothing, or another field says it: losses of pretraining, special tokens, heads that
predict further tokens and are not loaded, names of what was there before."""
OF_THE_WRITER = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "torch_dtype",
    "transformers_version",
}
"""Of those, what another folder with the same mathematics says anew, or must not say: code and further heads stay
where they are."""
NAMES_OF_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
"""A file's names -> those of `RopeScaling`."""


KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class Fields:
    """What is left of a config.json. A field that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, *default: Any) -> Any:
        """The value of a field, or the default.

        It is of the default's kind; without a default a whole number, and of any kind if that is None.

        Raises:
          ValueError: if the value is of another kind, or the field is absent and there is no default.
        """
        if name not in self._values and not default:
            raise ValueError(f"config.json lacks the field {name}")
        value = self._values.pop(name, *default)
        kind = type(default[0]) if default else int
        supported = (int, float) if kind is float else kind
        if kind in KINDS and (not isinstance(value, supported) or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"config.json has {name} = {value!r}, but it must be {KINDS[kind]}")
        return value

    def peek(self, name: str, default: Any = None) -> Any:
        """The same, without taking it."""
        return self._values.get(name, default)

    def expect(self, name: str, *supported: Any) -> Any:
        """The value of a field of which not all values are supported; the first of them when absent.

        Raises:
          ValueError: on another value.
        """
        value = self._values.pop(name, supported[0])
        if value not in supported:
            choices = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"config.json has {name} = {value!r}, but only {choices} is supported")
        return value

    def close(self) -> None:
        """Raises ValueError if a field is left that may change the mathematics."""
        left = sorted(self._values.keys() - WITHOUT_EFFECT)
        if left:
            raise ValueError(
                f"config.json has {left[0]} = {self._values[left[0]]!r}, which this library does not know: what it "
                "computes could be wrong"
            )


def read_config_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a Hugging Face folder.

    Raises:
      ValueError: if there is none, or it is no JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{os.fspath(folder)} is no Hugging Face folder: it has no config.json")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return values


def take_rope(fields: Fields, default_theta: float, default: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `TransformerConfig`, from the fields of old and new versions.

    Args:
      fields: of the config.json.
      default_theta: what a config.json means that does not say it.
      default: the same of scaling.

    Raises:
      ValueError: on a kind of scaling, or a field of it, that is not supported.
    """
    theta = fields.take("rope_theta", default_theta)
    old, new = fields.take("rope_scaling", {}), fields.take("rope_parameters", {})
    if old and new:
        raise ValueError("config.json has both rope_scaling and rope_parameters: leave one of them out")
    rope = Fields(old or new or default)
    theta = rope.take("rope_theta", theta)
    kind = rope.take("rope_type", rope.take("type", "default"))
    for part in (fields, rope):
        part.expect("partial_rotary_factor", 1.0)
    values = {
        ours: rope.take(theirs, None) for theirs, ours in NAMES_OF_SCALING.items() if rope.peek(theirs) is not None
    }
    if kind == "default" and values:
        raise ValueError(f"config.json scales rotary positions by {sorted(values)[0]}, but has no rope_type")
    if kind in ("yarn", "llama3") and "original_max_positions" not in values:
        values["original_max_positions"] = fields.peek("max_position_embeddings")
    try:
        scaling = None if kind == "default" else RopeScaling(kind, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json has rotary positions that are not supported: {error}") from error
    rope.close()
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def rope_fields(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """What `take_rope` reads back, in the form that both old and new versions of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    values = {theirs: getattr(scaling, ours) for theirs, ours in NAMES_OF_SCALING.items()}
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": scaling.kind} | {k: v for k, v in values.items() if v is not None},
    }
