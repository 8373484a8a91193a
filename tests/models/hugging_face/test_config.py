"""The fields of config.json: their meaning, the defaults, and the refusals. Nothing is compiled."""

import functools
import json

import pytest
from support import hf_cases

from models import LatentAttention, RopeScaling, TransformerConfig, load_config_hf
from models.hugging_face.families import FAMILIES, family_for, family_of

CASE_OF = {hf_cases.CASES[case][0]: case for case in reversed(hf_cases.CASES)}


@functools.cache
def written(model_type):
    """Return the config.json of a tiny model as transformers writes it."""
    return json.loads((hf_cases.GOLDEN / CASE_OF[model_type] / "config.json").read_text())


def config_json(model_type, changes):
    return written(model_type) | changes


def read(values):
    return family_of(values["model_type"]).config_of(values)


def write(folder, values):
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


NO_FAMILY = [
    (None, "is not a Hugging Face folder: it has no config.json"),
    ('{"model_type": ', "config.json is damaged"),
    ('["qwen3_moe"]', "config.json is damaged: it does not hold an object"),
    ({"model_type": "llama"}, "model_type 'llama'; supported are qwen3_moe, qwen2_moe, olmoe, mixtral, gpt_oss"),
    ({"hidden_size": 8}, "model_type None"),
    ({"model_type": ["qwen3"]}, r"model_type \['qwen3'\]"),
]


def test_what_is_no_config_of_a_family_is_refused(tmp_path):
    for content, message in NO_FAMILY:
        if content is not None:
            write(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            load_config_hf(tmp_path)


COMMON = [
    ({"residual_scale": 2.0}, "residual_scale = 2.0, which this library does not know"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu' is supported"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling must be one of .*'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0]}}, "'longrope'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rotary positions that are not supported: .*factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 9.0}}, "beta_fast is not for"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, r"mrope_section = \[1\]"),
    ({"rope_parameters": {"factor": 2.0}}, "by factor, but has no rope_type"),
    ({"rope_parameters": {"sliding_attention": {}, "full_attention": {}}}, "full_attention = {}"),
    ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"rope_type": "linear"}}, "both rope_scaling and"),
    ({"rope_parameters": ["yarn"]}, r"rope_parameters = \['yarn'\], but it must be an object"),
    ({"hidden_size": "32"}, "hidden_size = '32', but it must be a whole number"),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers = 3.0, but it must be a whole number"),
    ({"vocab_size": True}, "vocab_size = True, but it must be a whole number"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small', but it must be a number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1, but it must be true or false"),
    ({"num_attention_heads": 0}, "num_heads must be at least 1"),
    ({"num_hidden_layers": 0}, "num_layers must be at least 1|3 layer_types, but 0 layers"),
    ({"num_key_value_heads": 3}, "num_kv_heads|latent attention"),
]
TOO_MANY = ({"num_experts_per_tok": 9}, "num_experts_per_token is 9, but a layer has only")
LAYERS = [
    (
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        r"layer_types \['chunked_attention'\]",
    ),
    ({"layer_types": ["full_attention"] * 2}, "2 layer_types, but 3 layers"),
]
SWITCHED = [
    ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is not true"),
    ({"layer_types": None, "use_sliding_window": True, "max_window_layers": 1}, "lacks the field sliding_window"),
]
NO_EXPERTS = "must have one number of experts, as num_experts or num_local_experts; it has 0"
SPARSE = [
    TOO_MANY,
    ({"num_local_experts": 0}, NO_EXPERTS),
    ({"num_local_experts": 4, "num_experts": 5}, "must have one number of experts"),
]
OWN = {
    "qwen3_moe": [
        *SPARSE,
        ({"use_sliding_window": True}, "lacks the field sliding_window"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types = "),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0, but it must be at least 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers = 1, but it must be a list"),
        ({"mlp_only_layers": [1], "intermediate_size": None}, "dense_size must be at least 1"),
    ],
    "qwen2_moe": [
        *LAYERS,
        *SWITCHED,
        TOO_MANY,
        ({"num_experts": 0}, NO_EXPERTS),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size = 0, but it must be at least 1"),
    ],
    "olmoe": [TOO_MANY, ({"num_experts": 0}, NO_EXPERTS), ({"clip_qkv": -1.0}, "clip_qkv must be 0 or more")],
    "mixtral": [*SPARSE, ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1")],
    "gpt_oss": [
        *SPARSE,
        *LAYERS,
        ({"sliding_window": None}, "lacks the field sliding_window"),
        ({"swiglu_limit": 6.0}, "swiglu_limit = 6.0, but only 7.0 is supported"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ],
    "deepseek_v3": [
        TOO_MANY,
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax', but only 'sigmoid' is supported"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"n_routed_experts": 0}, "must have one number of experts, as n_routed_experts; it has 0"),
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"topk_group": 5}, "router_groups_per_token must be between 1 and router_groups"),
    ],
    "qwen3": [*LAYERS, *SWITCHED, ({"intermediate_size": 0}, "dense_size must be at least 1")],
    "qwen2": [*LAYERS, *SWITCHED, ({"use_mrope": True}, "use_mrope = True")],
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_field_that_would_change_the_mathematics_is_refused(model_type):
    for changes, message in COMMON + OWN[model_type]:
        with pytest.raises(ValueError, match=message):
            read(config_json(model_type, changes))


SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
DEEPSEEK_SIZES = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size"]
NEEDED = {
    "qwen3_moe": ["moe_intermediate_size", "num_experts_per_tok"],
    "qwen2_moe": ["moe_intermediate_size", "num_experts_per_tok", "shared_expert_intermediate_size"],
    "olmoe": ["intermediate_size", "num_experts_per_tok"],
    "mixtral": ["intermediate_size", "num_experts_per_tok"],
    "gpt_oss": ["intermediate_size", "num_experts_per_tok"],
    "deepseek_v3": [*DEEPSEEK_SIZES, "intermediate_size", "num_experts_per_tok"],
    "qwen3": ["intermediate_size"],
    "qwen2": ["intermediate_size"],
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_missing_field_is_named(model_type):
    for field in SIZES + NEEDED[model_type]:
        null = config_json(model_type, {field: None})
        absent = {name: value for name, value in null.items() if name != field}
        for values in (null, absent):
            with pytest.raises(ValueError, match=f"^config.json lacks the field {field}$"):
                read(values)


UNDERSTOOD = [
    ("mixtral", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
    ("qwen3_moe", {"head_dim": None}, {"head_dim": 8}),
    ("qwen3_moe", {"mlp_only_layers": None, "decoder_sparse_step": 3}, {"dense_layers": (0, 1), "dense_size": 24}),
    ("qwen3_moe", {"mlp_only_layers": [1, 2, 7]}, {"dense_layers": (1, 2), "dense_size": 24}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}, {"sliding_layers": (0, 1, 2)}),
    ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 9}, {"sliding_window": 0, "sliding_layers": ()}),
    ("qwen3_moe", {"num_local_experts": None, "num_experts": 5}, {"num_experts": 5}),
    ("qwen3_moe", {"num_local_experts": 5, "num_experts": 5}, {"num_experts": 5}),
    ("qwen3_moe", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 3e6}, {"rope_theta": 3e6}),
    ("qwen3_moe", {"rope_parameters": {"rope_theta": 2e6}, "rope_theta": 3e6}, {"rope_theta": 2e6}),
    ("qwen3_moe", {"tie_word_embeddings": None, "quantization_config": None}, {"tie_embeddings": False}),
    ("qwen3_moe", {"rms_norm_eps": None}, {"rms_norm_epsilon": 1e-6}),
    ("olmoe", {"rms_norm_eps": None}, {"rms_norm_epsilon": 1e-5}),
    ("mixtral", {"rms_norm_eps": None}, {"rms_norm_epsilon": 1e-5}),
    ("gpt_oss", {"rms_norm_eps": None}, {"rms_norm_epsilon": 1e-5}),
    ("qwen3", {"rope_parameters": {"partial_rotary_factor": 1.0}}, {"rope_scaling": None}),
    ("qwen2_moe", {"qkv_bias": False}, {"attention_bias": "none"}),
    ("olmoe", {"clip_qkv": None}, {"clip_qkv": 0.0}),
    ("olmoe", {"clip_qkv": 8}, {"clip_qkv": 8.0}),
    ("mixtral", {"sliding_window": 7}, {"sliding_window": 7, "sliding_layers": (0, 1, 2)}),
    ("mixtral", {"sliding_window": None}, {"sliding_window": 0, "sliding_layers": ()}),
    ("mixtral", {"rope_parameters": None}, {"rope_theta": 1e6}),
    ("gpt_oss", {"layer_types": None}, {"sliding_layers": (0, 2)}),
    (
        "gpt_oss",
        {"rope_parameters": None},
        {
            "rope_theta": 1.5e5,
            "rope_scaling": RopeScaling("yarn", 32.0, 4096, 32.0, 1.0, truncate=False),
        },
    ),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 1.5e5, "rope_scaling": None}),
    ("deepseek_v3", {"q_lora_rank": None}, {"latent": LatentAttention(12, 10, 6, 14, 0)}),
    ("deepseek_v3", {"first_k_dense_replace": 0}, {"dense_layers": (), "dense_size": 0}),
    ("deepseek_v3", {"first_k_dense_replace": 9}, {"dense_layers": (0, 1, 2)}),
    ("deepseek_v3", {"routed_scaling_factor": 3}, {"expert_weight_scale": 3.0}),
    ("qwen2", {"rope_parameters": {"type": "yarn", "factor": 4}}, {"rope_scaling": RopeScaling("yarn", 4, 64)}),
]


def test_a_field_is_understood_as_transformers_does():
    for model_type, changes, meant in UNDERSTOOD:
        config = read(config_json(model_type, changes))
        assert {name: getattr(config, name) for name in meant} == meant, (model_type, changes)


@pytest.mark.parametrize(
    ("model_type", "first", "layers"),
    [
        ("qwen2_moe", 28, (0, 2)),
        ("qwen2_moe", 2, (0,)),
        ("qwen2", 28, ()),
        ("qwen2", 1, (1, 2)),
        ("qwen3", 0, (0, 1, 2)),
    ],
)
def test_which_layers_slide_where_no_layer_types_say_it(model_type, first, layers):
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": first, "layer_types": None}
    config = read(config_json(model_type, changes))
    assert (config.sliding_layers, config.sliding_window) == (layers, 5 if layers else 0)


@pytest.mark.parametrize(
    ("changes", "arguments", "dtypes"),
    [
        ({"dtype": "bfloat16"}, {}, ("bfloat16", "float32")),
        ({"dtype": None, "torch_dtype": "bfloat16"}, {}, ("bfloat16", "float32")),
        ({"dtype": "float16"}, {}, ("float32", "float32")),
        ({"dtype": None}, {}, ("float32", "float32")),
        ({}, {"dtype": "bfloat16", "param_dtype": "bfloat16"}, ("bfloat16", "bfloat16")),
    ],
)
def test_activations_are_in_the_dtype_of_the_weights_unless_said(changes, arguments, dtypes, tmp_path):
    config = load_config_hf(write(tmp_path, config_json("qwen3", changes)), **arguments)
    assert (config.dtype, config.param_dtype) == dtypes


LATENT = LatentAttention(kv_rank=8, plain_dim=16, rotary_dim=8, value_dim=16)
SIGMOID = {"latent": LATENT, "num_kv_heads": 4, "query_key_norm": "none", "router": "sigmoid"}
BIASED = {"router_bias": True, "expert_biases": True, "attention_bias": "all", "activation": "clamped"}


BELONGS = [
    ({}, "qwen3_moe"),
    ({"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"}, "qwen3_moe"),
    ({"dense_size": 7}, "qwen3_moe"),
    ({"num_experts": 0, "dense_size": 7}, "qwen3"),
    ({"num_experts": 0, "dense_size": 7, "expert_size": 9, "router": "sigmoid", "dense_layers": (1,)}, "qwen3"),
    ({"query_key_norm": "projection"}, "olmoe"),
    (SIGMOID, "deepseek_v3"),
    ({**BIASED, "query_key_norm": "none", "attention_sinks": True}, "gpt_oss"),
]


def test_a_configuration_belongs_to_a_family():
    for fields, model_type in BELONGS:
        assert family_for(TransformerConfig(**fields)).model_type == model_type, fields


HOMELESS = [
    {"router": "sigmoid"},
    {"attention_bias": "qkv"},
    {"attention_sinks": True},
    {**BIASED, "query_key_norm": "none"},
    {"expert_weight_scale": 2.0},
    {"gate_shared_expert": True, "shared_expert_size": 8},
    {"sliding_window": 4, "sliding_layers": (1,)},
    {"query_key_norm": "projection", "head_dim": 12},
    {"query_key_norm": "none", "normalize_expert_weights": False},
    {"num_experts": 0, "dense_size": 8, "query_key_norm": "none"},
    {**SIGMOID, "dense_layers": (1,), "dense_size": 8},
    {**SIGMOID, "shared_expert_size": 100},
    {**SIGMOID, "num_experts": 0, "dense_size": 8},
]


def test_a_configuration_of_no_family_cannot_be_saved():
    for fields in HOMELESS:
        with pytest.raises(ValueError, match=r"no family of Hugging Face models \(qwen3_moe, .*cannot be saved"):
            family_for(TransformerConfig(**fields))
