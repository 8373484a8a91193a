"""The families of Hugging Face models, each with the translation of its config.json to a `TransformerConfig` and back.

The part that all families share is written once, and each adds its own. Only this table knows families: the transformer
itself reads a `TransformerConfig`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config import LatentAttention, TransformerConfig
from models.experts import CLAMP_LIMIT, CLAMP_SLOPE
from models.hugging_face.config_json import Fields, rope_fields, take_rope
from models.hugging_face.names import Names

SLIDING, FULL = "sliding_attention", "full_attention"
EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts")


@dataclass(frozen=True)
class Family:
    """A family: the models of one architecture."""

    model_type: str
    architecture: str
    read: Callable[[Fields, int], dict[str, Any]]
    """Function that takes the fields of this family, given the number of layers, and returns their meaning as fields of
    a `TransformerConfig`, which add to or replace the shared ones."""
    write: Callable[[TransformerConfig], dict[str, Any]]
    """The inverse of `read`: fields of config.json, with None for those that must be absent."""
    names: Names = Names()
    """Names of the tensors."""
    default_theta: float = 10_000.0
    """Base of the rotary frequencies where config.json gives none."""
    default_epsilon: float = 1e-6
    """Epsilon of the norms where config.json gives none."""
    default_rope: Mapping[str, Any] = field(default_factory=dict)
    """Scaling of rotary positions where config.json gives none, as fields of `rope_parameters`."""

    def config_of(self, values: Mapping[str, Any]) -> TransformerConfig:
        """Return the configuration that a config.json describes.

        Raises:
          ValueError: if it lacks a field, or has one that is not supported.
        """
        fields = Fields(values)
        if fields.peek("quantization_config") is not None:
            raise ValueError(
                "config.json has a quantization_config: the weights are packed. Unpack them first, with dequantize() "
                "and save_pretrained() of transformers"
            )
        fields.expect("hidden_act", "silu")
        fields.expect("attention_dropout", 0.0)
        heads, hidden_size = fields.take("num_attention_heads"), fields.take("hidden_size")
        shared = {
            "vocab_size": fields.take("vocab_size"),
            "hidden_size": hidden_size,
            "num_layers": fields.take("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": fields.take("num_key_value_heads", heads),
            "head_dim": fields.take("head_dim", hidden_size // max(heads, 1)),
            "rms_norm_epsilon": fields.take("rms_norm_eps", self.default_epsilon),
            "tie_embeddings": fields.take("tie_word_embeddings", False),
            **take_rope(fields, self.default_theta, self.default_rope),
        }
        config = {**shared, **self.read(fields, shared["num_layers"])}
        fields.close()
        return TransformerConfig(**config)

    def fields_of(self, config: TransformerConfig) -> dict[str, Any]:
        """Return the config.json of a configuration that the family expresses.

        Of any other configuration it returns one that reads back differently.
        """
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_epsilon,
            "tie_word_embeddings": config.tie_embeddings,
            **rope_fields(config.rope_theta, config.rope_scaling),
            **self.write(config),
        }

    def expresses(self, config: TransformerConfig) -> bool:
        """Return whether a config.json of this family can describe such a model."""
        try:
            described = self.config_of(self.fields_of(config))
        except ValueError:
            return False
        return described == _with_effect(config)


def _with_effect(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration with defaults for the fields that do not change the results."""
    without = ["dtype", "param_dtype", "remat"]
    if not config.num_experts:
        without += ["num_experts_per_token", "expert_size", "normalize_expert_weights", "expert_weight_scale"]
        without += ["shared_expert_size", "gate_shared_expert", "expert_biases", "activation", "dense_layers"]
        without += ["router", "router_bias", "router_groups", "router_groups_per_token"]
    elif not config.dense_layers:
        without += ["dense_size"]
    plain = TransformerConfig()
    return dataclasses.replace(config, **{name: getattr(plain, name) for name in without})


def family_of(model_type: Any) -> Family:
    """Return the family of a config.json's `model_type`.

    Raises:
      ValueError: if there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json has the model_type {model_type!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def family_for(config: TransformerConfig) -> Family:
    """Return the first family that expresses a configuration.

    Raises:
      ValueError: if there is none.
    """
    for family in FAMILIES.values():
        if family.expresses(config):
            return family
    raise ValueError(
        f"no family of Hugging Face models ({', '.join(FAMILIES)}) expresses this configuration, so it cannot be saved "
        f"as one: {config}"
    )


def _sliding(window: int, layers: list[int]) -> dict[str, Any]:
    if layers and not window:
        raise ValueError("config.json has layers with a sliding window, but lacks the field sliding_window")
    return {"sliding_window": window, "sliding_layers": tuple(layers)} if layers else {}


def _take_sliding_layers(fields: Fields, num_layers: int, by_default: Callable[[int], bool]) -> list[int]:
    """Return the layers that slide, in a family whose layers may differ: those of `layer_types`, or else of a rule."""
    types = fields.take("layer_types", []) or [SLIDING if by_default(layer) else FULL for layer in range(num_layers)]
    unknown = sorted(str(kind) for kind in types if kind not in (SLIDING, FULL))
    if unknown:
        raise ValueError(f"config.json has layer_types {unknown}, but only {SLIDING} and {FULL} are supported")
    if len(types) != num_layers:
        raise ValueError(f"config.json has {len(types)} layer_types, but {num_layers} layers")
    return [layer for layer, kind in enumerate(types) if kind == SLIDING]


def _layer_types(config: TransformerConfig) -> list[str]:
    return [SLIDING if layer in config.sliding_layers else FULL for layer in range(config.num_layers)]


def _read_qwen_sliding(fields: Fields, num_layers: int, by_default: Callable[[int], bool]) -> dict[str, Any]:
    window, slides = fields.take("sliding_window", 0), fields.take("use_sliding_window", False)
    layers = _take_sliding_layers(fields, num_layers, lambda layer: slides and by_default(layer))
    if layers and not slides:
        raise ValueError(f"config.json has layer_types with {SLIDING}, but use_sliding_window is not true")
    return _sliding(window, layers)


def _write_qwen_sliding(config: TransformerConfig) -> dict[str, Any]:
    if not config.sliding_layers:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": _layer_types(config)}


def _read_qwen_dense(fields: Fields, num_layers: int) -> dict[str, Any]:
    fields.expect("use_mrope", False)
    first = fields.take("max_window_layers", 28)
    return {
        "num_experts": 0,
        "dense_size": fields.take("intermediate_size"),
        **_read_qwen_sliding(fields, num_layers, lambda layer: layer >= first),
    }


def _read_qwen2(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {"attention_bias": "qkv", "query_key_norm": "none", **_read_qwen_dense(fields, num_layers)}


def _read_qwen3(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {**_read_attention_bias(fields), **_read_qwen_dense(fields, num_layers)}


def _read_attention_bias(fields: Fields, default: bool = False) -> dict[str, Any]:
    return {"attention_bias": "all" if fields.take("attention_bias", default) else "none"}


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    return {"intermediate_size": config.dense_size, **_write_qwen_sliding(config)}


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias == "all", **_write_qwen2(config)}


def _take_experts(fields: Fields, *names: str) -> int:
    """Return the number of experts, whose name depends on the version of transformers."""
    found = {fields.take(name, 0) for name in names} - {0}
    if len(found) != 1:
        raise ValueError(f"config.json must have one number of experts, as {' or '.join(names)}; it has {found or 0}")
    return found.pop()


def _read_qwen_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    step, without = fields.take("decoder_sparse_step", 1), fields.take("mlp_only_layers", [])
    if step < 1:
        raise ValueError(f"config.json has decoder_sparse_step = {step}, but it must be at least 1")
    dense = tuple(layer for layer in range(num_layers) if layer in without or (layer + 1) % step)
    size = fields.take("intermediate_size", 0)
    return {
        "num_experts": _take_experts(fields, *EXPERT_COUNT_NAMES),
        "num_experts_per_token": fields.take("num_experts_per_tok"),
        "expert_size": fields.take("moe_intermediate_size"),
        "normalize_expert_weights": fields.take("norm_topk_prob", False),
        "dense_layers": dense,
        "dense_size": size if dense else 0,
    }


def _write_qwen_experts(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.normalize_expert_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "intermediate_size": config.dense_size or config.expert_size,
    }


def _read_qwen3_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    window, slides = fields.take("sliding_window", 0), fields.take("use_sliding_window", False)
    return {
        **_read_attention_bias(fields),
        **_read_qwen_experts(fields, num_layers),
        **_sliding(window, list(range(num_layers)) if slides else []),
    }


def _write_qwen3_moe(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_write_qwen_experts(config),
        "attention_bias": config.attention_bias == "all",
        "use_sliding_window": bool(config.sliding_layers),
        "sliding_window": config.sliding_window or None,
    }


def _read_qwen2_moe(fields: Fields, num_layers: int) -> dict[str, Any]:
    last = fields.take("max_window_layers", 28)
    shared = fields.take("shared_expert_intermediate_size")
    if shared < 1:
        raise ValueError(f"config.json has shared_expert_intermediate_size = {shared}, but it must be at least 1")
    return {
        "attention_bias": "qkv" if fields.take("qkv_bias", True) else "none",
        "query_key_norm": "none",
        "shared_expert_size": shared,
        "gate_shared_expert": True,
        **_read_qwen_experts(fields, num_layers),
        **_read_qwen_sliding(fields, num_layers, lambda layer: layer % 2 == 0 and layer < last),
    }


def _write_qwen2_moe(config: TransformerConfig) -> dict[str, Any]:
    return {
        **_write_qwen_experts(config),
        **_write_qwen_sliding(config),
        "qkv_bias": config.attention_bias == "qkv",
        "shared_expert_intermediate_size": config.shared_expert_size,
    }


def _read_olmoe(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {
        **_read_attention_bias(fields),
        "query_key_norm": "projection",
        "clip_qkv": fields.take("clip_qkv", 0.0),
        "num_experts": _take_experts(fields, *EXPERT_COUNT_NAMES),
        "num_experts_per_token": fields.take("num_experts_per_tok"),
        "expert_size": fields.take("intermediate_size"),
        "normalize_expert_weights": fields.take("norm_topk_prob", False),
    }


def _write_olmoe(config: TransformerConfig) -> dict[str, Any]:
    if config.num_heads * config.head_dim != config.hidden_size:
        raise ValueError("the heads of an OLMoE model must together be as wide as its hidden state")
    return {
        "attention_bias": config.attention_bias == "all",
        "clip_qkv": config.clip_qkv or None,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "intermediate_size": config.expert_size,
        "norm_topk_prob": config.normalize_expert_weights,
    }


def _read_mixtral(fields: Fields, num_layers: int) -> dict[str, Any]:
    fields.expect("router_jitter_noise", 0.0)
    window = fields.take("sliding_window", 0)
    return {
        "query_key_norm": "none",
        "num_experts": _take_experts(fields, *EXPERT_COUNT_NAMES),
        "num_experts_per_token": fields.take("num_experts_per_tok"),
        "expert_size": fields.take("intermediate_size"),
        **_sliding(window, list(range(num_layers)) if window else []),
    }


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "intermediate_size": config.expert_size,
        "sliding_window": config.sliding_window or None,
    }


def _read_gpt_oss(fields: Fields, num_layers: int) -> dict[str, Any]:
    fields.expect("swiglu_limit", CLAMP_LIMIT)
    fields.expect("swiglu_alpha", CLAMP_SLOPE)
    return {
        **_read_attention_bias(fields, default=True),
        "query_key_norm": "none",
        "attention_sinks": True,
        "num_experts": _take_experts(fields, *EXPERT_COUNT_NAMES),
        "num_experts_per_token": fields.take("num_experts_per_tok"),
        "expert_size": fields.take("intermediate_size"),
        "router_bias": True,
        "expert_biases": True,
        "activation": "clamped",
        **_sliding(
            fields.take("sliding_window", 0), _take_sliding_layers(fields, num_layers, lambda layer: layer % 2 == 0)
        ),
    }


def _write_gpt_oss(config: TransformerConfig) -> dict[str, Any]:
    return {
        **({} if config.rope_scaling else {"rope_scaling": {"rope_type": "default"}}),
        "swiglu_limit": CLAMP_LIMIT,
        "attention_bias": config.attention_bias == "all",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "intermediate_size": config.expert_size,
        "sliding_window": config.sliding_window or 128,  # transformers needs one even where no layer slides
        "layer_types": _layer_types(config),
    }


def _read_deepseek(fields: Fields, num_layers: int) -> dict[str, Any]:
    for name, supported in (
        ("attention_bias", False),
        ("rope_interleave", True),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
    ):
        fields.expect(name, supported)
    latent = LatentAttention(
        kv_rank=fields.take("kv_lora_rank"),
        plain_dim=fields.take("qk_nope_head_dim"),
        rotary_dim=fields.take("qk_rope_head_dim"),
        value_dim=fields.take("v_head_dim"),
        query_rank=fields.take("q_lora_rank", 0),
    )
    fields.take("qk_head_dim", None)
    dense = tuple(range(min(fields.take("first_k_dense_replace", 0), num_layers)))
    size, expert_size = fields.take("intermediate_size"), fields.take("moe_intermediate_size")
    return {
        "latent": latent,
        "head_dim": latent.plain_dim + latent.rotary_dim,
        "query_key_norm": "none",
        "dense_layers": dense,
        "dense_size": size if dense else 0,
        "num_experts": _take_experts(fields, "n_routed_experts"),
        "num_experts_per_token": fields.take("num_experts_per_tok"),
        "expert_size": expert_size,
        "shared_expert_size": fields.take("n_shared_experts", 0) * expert_size,
        "router": "sigmoid",
        "router_groups": fields.take("n_group", 8),
        "router_groups_per_token": fields.take("topk_group", 4),
        "normalize_expert_weights": fields.take("norm_topk_prob", True),
        "expert_weight_scale": fields.take("routed_scaling_factor", 2.5),
    }


def _write_deepseek(config: TransformerConfig) -> dict[str, Any]:
    latent = config.latent
    if latent is None:
        raise ValueError("a DeepSeek model must have latent attention")
    return {
        "attention_bias": False,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "head_dim": latent.rotary_dim,
        "first_k_dense_replace": len(config.dense_layers),
        "intermediate_size": config.dense_size or config.expert_size,
        "moe_intermediate_size": config.expert_size,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.shared_expert_size // config.expert_size,
        "num_experts_per_tok": config.num_experts_per_token,
        "n_group": config.router_groups,
        "topk_group": config.router_groups_per_token,
        "norm_topk_prob": config.normalize_expert_weights,
        "routed_scaling_factor": config.expert_weight_scale,
    }


MIXTRAL_NAMES = Names(
    router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate_up_down=("w1", "w3", "w2")
)
GPT_OSS_NAMES = Names(router="mlp.router", experts_together=True)
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe),
        Family("olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe, default_epsilon=1e-5),
        Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, MIXTRAL_NAMES, 1_000_000.0, 1e-5),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            _read_gpt_oss,
            _write_gpt_oss,
            GPT_OSS_NAMES,
            150_000.0,
            1e-5,
            GPT_OSS_ROPE,
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            _read_deepseek,
            _write_deepseek,
            Names(shared="mlp.shared_experts"),
        ),
        Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
        Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    )
}
"""All families, by `model_type`."""
