"""The config.json of released models, its meaning, and the number of parameters. Nothing is compiled."""

import functools
import json
import math

import jax
import pytest

from models import LatentAttention, RopeScaling, TransformerConfig, init_params, load_config_hf

ALTERNATING = ["sliding_attention", "full_attention"] * 12
RELEASED = {
    "Qwen3-30B-A3B": """{
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen3-235B-A22B": """{
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "max_window_layers": 94, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 1536,
        "norm_topk_prob": true, "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 94, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen1.5-MoE-A2.7B": """{
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen2-57B-A14B": """{
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072,
        "max_window_layers": 28, "model_type": "qwen2_moe", "moe_intermediate_size": 2560, "norm_topk_prob": false,
        "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 20480, "sliding_window": 131072,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 151936}""",
    "OLMoE-1B-7B-0924": """{
        "architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 50304}""",
    "Mixtral-8x7B-v0.1": """{
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
        "use_cache": true, "vocab_size": 32000}""",
    "gpt-oss-20b": """{
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": LAYER_TYPES, "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999, "quantization_config":
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
        "lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0,
        "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": false}, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": false, "transformers_version": "4.55.0.dev0", "use_cache": true,
        "vocab_size": 201088}""".replace("LAYER_TYPES", json.dumps(ALTERNATING)),
    "DeepSeek-V3": """{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map":
        {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config":
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 4,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
        "v_head_dim": 128, "vocab_size": 129280}""",
    "Moonlight-16B-A3B": """{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "auto_map":
        {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264, "kv_lora_rank": 512,
        "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": true,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": true,
        "v_head_dim": 128, "vocab_size": 163840}""",
    "Qwen2.5-0.5B": """{
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
        "vocab_size": 151936}""",
    "Qwen3-0.6B": """{
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
}
"""Name of the model -> its config.json."""


def shape(layers, hidden_size, heads, kv_heads, head_dim, vocab_size, theta=1e6, **others):
    return TransformerConfig(
        num_layers=layers,
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        rope_theta=theta,
        dtype="bfloat16",
        **others,
    )


def experts(number, chosen, size):
    return {"num_experts": number, "num_experts_per_token": chosen, "expert_size": size}


QWEN2_MOE = {"attention_bias": "qkv", "query_key_norm": "none", "normalize_expert_weights": False}
DEEPSEEK = {"query_key_norm": "none", "router": "sigmoid"}
MEANT = {
    "Qwen3-30B-A3B": (shape(48, 2048, 32, 4, 128, 151936, **experts(128, 8, 768)), 30.5e9),
    "Qwen3-235B-A22B": (shape(94, 4096, 64, 4, 128, 151936, **experts(128, 8, 1536)), 235.1e9),
    "Qwen1.5-MoE-A2.7B": (
        shape(
            24,
            2048,
            16,
            16,
            128,
            151936,
            **experts(60, 4, 1408),
            **QWEN2_MOE,
            shared_expert_size=5632,
            gate_shared_expert=True,
        ),
        14.3e9,
    ),
    "Qwen2-57B-A14B": (
        shape(
            28,
            3584,
            28,
            4,
            128,
            151936,
            **experts(64, 8, 2560),
            **QWEN2_MOE,
            shared_expert_size=20480,
            gate_shared_expert=True,
        ),
        57.4e9,
    ),
    "OLMoE-1B-7B-0924": (
        shape(
            16,
            2048,
            16,
            16,
            128,
            50304,
            1e4,
            **experts(64, 8, 1024),
            query_key_norm="projection",
            normalize_expert_weights=False,
            rms_norm_epsilon=1e-5,
        ),
        6.92e9,
    ),
    "Mixtral-8x7B-v0.1": (
        shape(32, 4096, 32, 8, 128, 32000, **experts(8, 2, 14336), query_key_norm="none", rms_norm_epsilon=1e-5),
        46.7e9,
    ),
    "gpt-oss-20b": (
        shape(
            24,
            2880,
            64,
            8,
            64,
            201088,
            1.5e5,
            **experts(32, 4, 2880),
            attention_bias="all",
            query_key_norm="none",
            attention_sinks=True,
            router_bias=True,
            expert_biases=True,
            activation="clamped",
            sliding_window=128,
            sliding_layers=tuple(range(0, 24, 2)),
            rope_scaling=RopeScaling("yarn", 32.0, 4096, 32.0, 1.0, truncate=False),
            rms_norm_epsilon=1e-5,
        ),
        20.9e9,
    ),
    "DeepSeek-V3": (
        shape(
            61,
            7168,
            128,
            128,
            192,
            129280,
            1e4,
            **experts(256, 8, 2048),
            **DEEPSEEK,
            latent=LatentAttention(kv_rank=512, plain_dim=128, rotary_dim=64, value_dim=128, query_rank=1536),
            dense_layers=(0, 1, 2),
            dense_size=18432,
            shared_expert_size=2048,
            router_groups=8,
            router_groups_per_token=4,
            expert_weight_scale=2.5,
            rope_scaling=RopeScaling("yarn", 40.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0),
        ),
        671e9,
    ),
    "Moonlight-16B-A3B": (
        shape(
            27,
            2048,
            16,
            16,
            192,
            163840,
            5e4,
            **experts(64, 6, 1408),
            **DEEPSEEK,
            latent=LatentAttention(kv_rank=512, plain_dim=128, rotary_dim=64, value_dim=128),
            dense_layers=(0,),
            dense_size=11264,
            shared_expert_size=2816,
            expert_weight_scale=2.446,
            rms_norm_epsilon=1e-5,
        ),
        16.0e9,
    ),
    "Qwen2.5-0.5B": (
        shape(
            24,
            896,
            14,
            2,
            64,
            151936,
            num_experts=0,
            dense_size=4864,
            attention_bias="qkv",
            query_key_norm="none",
            tie_embeddings=True,
        ),
        0.494e9,
    ),
    "Qwen3-0.6B": (
        shape(28, 1024, 16, 8, 128, 151936, num_experts=0, dense_size=3072, tie_embeddings=True),
        0.596e9,
    ),
}
"""Name of the model -> the meaning of its config.json, and the number of parameters that its authors state."""


def write(folder, values):
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_what_its_authors_say(name, tmp_path):
    values = json.loads(RELEASED[name])
    values.pop("quantization_config", None)
    values.setdefault("torch_dtype", "bfloat16")
    config, parameters = MEANT[name]
    assert load_config_hf(write(tmp_path, values)) == config
    leaves = jax.tree.leaves(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))
    digits = 2 - math.floor(math.log10(parameters))  # three of them
    assert round(sum(math.prod(leaf.shape) for leaf in leaves), digits) == round(parameters, digits)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "DeepSeek-V3"])
def test_packed_weights_are_refused_with_the_way_out(name, tmp_path):
    with pytest.raises(ValueError, match=r"quantization_config.*dequantize\(\) and save_pretrained\(\)"):
        load_config_hf(write(tmp_path, RELEASED[name]))
