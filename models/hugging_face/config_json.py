"""The fields of a `config.json`, taken one by one, and the refusal of those that nobody takes.

Only fields that are known to leave the mathematics alone may be left over. Any other is refused by name, because a
model that runs and is wrong costs more than one that does not load. The meaning of a field is up to `families`.
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
"""Fields that a forward pass ignores, or that repeat another field: losses of pretraining, special tokens, heads for
further tokens (which are not loaded), older names."""
WRITER_FIELDS = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "torch_dtype",
    "transformers_version",
}
"""Those among them that a new folder with the same mathematics sets anew or must leave out, as code and further heads
are not copied."""
SCALING_NAMES = {
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
"""Names in the file -> names in `RopeScaling`."""
TYPE_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


class Fields:
    """The fields of a config.json that have not been taken yet. A field that is null counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, *default: Any) -> Any:
        """Remove a field and return its value, or the default.

        Args:
          name: the field.
          default: at most one. The value must be of its type, or of any type if it is None. Without a default, the
            value must be a whole number.

        Raises:
          ValueError: if the value is of another type, or the field is absent and there is no default.
        """
        if name not in self._values and not default:
            raise ValueError(f"config.json lacks the field {name}")
        value = self._values.pop(name, *default)
        wanted = type(default[0]) if default else int
        supported = (int, float) if wanted is float else wanted
        if wanted in TYPE_NAMES and (not isinstance(value, supported) or isinstance(value, bool) != (wanted is bool)):
            raise ValueError(f"config.json has {name} = {value!r}, but it must be {TYPE_NAMES[wanted]}")
        return value

    def peek(self, name: str, default: Any = None) -> Any:
        """Return the value of a field, or the default, and keep the field."""
        return self._values.get(name, default)

    def expect(self, name: str, *supported: Any) -> Any:
        """Remove a field and return its value, which must be one of those supported; the first of them when absent.

        Raises:
          ValueError: on another value.
        """
        value = self._values.pop(name, supported[0])
        if value not in supported:
            choices = " or ".join(repr(choice) for choice in supported)
            raise ValueError(f"config.json has {name} = {value!r}, but only {choices} is supported")
        return value

    def close(self) -> None:
        """Check that no field is left that may change the mathematics.

        Raises:
          ValueError: naming the first such field.
        """
        left = sorted(self._values.keys() - WITHOUT_EFFECT)
        if left:
            raise ValueError(
                f"config.json has {left[0]} = {self._values[left[0]]!r}, which this library does not know: its results "
                "could be wrong"
            )


def read_config_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the config.json of a Hugging Face folder.

    Raises:
      ValueError: if there is none, or it is not a JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{os.fspath(folder)} is not a Hugging Face folder: it has no config.json")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it does not hold an object")
    return values


def take_rope(fields: Fields, default_theta: float, default: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` of a `TransformerConfig`, from the fields of old or new versions.

    Args:
      fields: those of the config.json; the ones about rotary positions are taken.
      default_theta: the base of a config.json that names none.
      default: the scaling of a config.json that names none, as fields of `rope_parameters`.

    Raises:
      ValueError: if a kind of scaling, or one of its fields, is not supported.
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
    values = {ours: rope.take(theirs, None) for theirs, ours in SCALING_NAMES.items() if rope.peek(theirs) is not None}
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
    """Return the inverse of `take_rope`: fields in the form that both old and new versions of transformers read."""
    if scaling is None:
        return {"rope_theta": theta}
    values = {theirs: getattr(scaling, ours) for theirs, ours in SCALING_NAMES.items()}
    return {
        "rope_theta": theta,
        "rope_scaling": {"rope_type": scaling.kind} | {k: v for k, v in values.items() if v is not None},
    }
