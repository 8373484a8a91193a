"""Sizes of models, as benchmarks and the pod compiler name them. It must never know what is done with a model."""

import models

MODELS = {
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
    # The public config.json of Qwen/Qwen3-30B-A3B.
    "qwen3-30b-a3b": models.TransformerConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_token=8,
        expert_size=768,
        rope_theta=1e6,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
    ),
    # The public config.json of Qwen/Qwen3-235B-A22B.
    "qwen3-235b-a22b": models.TransformerConfig(
        vocab_size=151_936,
        hidden_size=4096,
        num_layers=94,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_token=8,
        expert_size=1536,
        rope_theta=1e6,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="full",
    ),
}
