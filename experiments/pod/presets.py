"""Sizes of models, by the names that benchmarks and the pod compiler give them."""

from dataclasses import replace
from typing import Literal

import models

_TRAINED = models.TransformerConfig(dtype="bfloat16", param_dtype="bfloat16", remat="full")
_QWEN3 = replace(_TRAINED, vocab_size=151_936, num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1e6)
ModelName = Literal["small", "qwen3-30b-a3b", "qwen3-235b-a22b", "mixtral-8x7b", "gpt-oss-120b"]
MODELS: dict[ModelName, models.TransformerConfig] = {
    "small": models.TransformerConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_token=4,
        expert_size=128,
    ),
    # The others are copied from each model's public config.json.
    "qwen3-30b-a3b": replace(
        _QWEN3,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_experts=128,
        num_experts_per_token=8,
        expert_size=768,
    ),
    "qwen3-235b-a22b": replace(
        _QWEN3,
        hidden_size=4096,
        num_layers=94,
        num_heads=64,
        num_experts=128,
        num_experts_per_token=8,
        expert_size=1536,
    ),
    "mixtral-8x7b": replace(
        _TRAINED,
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_experts=8,
        num_experts_per_token=2,
        expert_size=14_336,
        query_key_norm="none",
        rope_theta=1e6,
        rms_norm_epsilon=1e-5,
    ),
    "gpt-oss-120b": replace(
        _TRAINED,
        vocab_size=201_088,
        hidden_size=2880,
        num_layers=36,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=128,
        num_experts_per_token=4,
        expert_size=2880,
        router_bias=True,
        expert_biases=True,
        activation="clamped",
        attention_bias="all",
        query_key_norm="none",
        attention_sinks=True,
        sliding_window=128,
        sliding_layers=tuple(range(0, 36, 2)),
        rope_theta=150_000.0,
        rope_scaling=models.RopeScaling("yarn", 32.0, original_max_positions=4096, truncate=False),
        rms_norm_epsilon=1e-5,
    ),
}
