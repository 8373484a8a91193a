"""Tiny models of every family: their configurations, their weights, and the outputs of transformers.

The weights follow from the tensors' names, so anyone can make them again. Both the tests and the script that asks
transformers use this file; it does not need torch.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parents[1] / "models" / "hugging_face" / "golden"
VOCABULARY = 40
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
GPT_OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 12}
MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16, "num_key_value_heads": 4}
DENSE = {"intermediate_size": 48}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {**QWEN_EXPERTS, "head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe_tied": (
        "qwen3_moe",
        {**QWEN_EXPERTS, "tie_word_embeddings": True, "mlp_only_layers": [0], "head_dim": 8},
    ),
    "qwen3_moe_every_second": ("qwen3_moe", {**QWEN_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_moe_yarn": ("qwen3_moe", {**QWEN_EXPERTS, "rope_parameters": YARN, "attention_bias": True}),
    "qwen3_moe_sliding": ("qwen3_moe", {**QWEN_EXPERTS, "use_sliding_window": True, "sliding_window": 3}),
    "qwen2_moe": ("qwen2_moe", {**QWEN_EXPERTS, "shared_expert_intermediate_size": 20}),
    "qwen2_moe_sliding": (
        "qwen2_moe",
        {
            **QWEN_EXPERTS,
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    ),
    "olmoe": ("olmoe", {**OLMOE, "clip_qkv": 0.5}),
    "olmoe_normalized": ("olmoe", {**OLMOE, "num_key_value_heads": 2, "norm_topk_prob": True, "rope_theta": 5e5}),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral_sliding": ("mixtral", {**MIXTRAL, "sliding_window": 4, "head_dim": 12, "tie_word_embeddings": True}),
    "gpt_oss": ("gpt_oss", {**GPT_OSS, "sliding_window": 4, "rope_parameters": {**YARN, "truncate": False}}),
    "gpt_oss_plain": ("gpt_oss", {**GPT_OSS, "layer_types": ["full_attention"] * 3, "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3_yarn": (
        "deepseek_v3",
        {**DEEPSEEK, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}, "norm_topk_prob": False},
    ),
    "moonlight": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_theta": 5e4,
            "routed_scaling_factor": 2.446,
        },
    ),
    "qwen3": ("qwen3", {**DENSE, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_linear": ("qwen3", {**DENSE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen2": ("qwen2", {**DENSE, "rope_parameters": LLAMA3}),
    "qwen2_sliding": (
        "qwen2",
        {
            **DENSE,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
            "head_dim": 12,
        },
    ),
}
"""Name of the case -> model_type, and the fields of its config.json beyond `SHARED`."""
LENGTHS = (7, 12)
"""Lengths of the two sequences that the models read."""


def sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(2, VOCABULARY, length) for length in LENGTHS]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make a float32 weight, of a size that lets every part of a model matter."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    elif name.endswith(("bias", "sinks")):
        values = 0.5 * values
    elif "embed" not in name:
        # gpt-oss keeps the matrices of experts with the inputs before the outputs.
        fan_in = shape[-2] if "experts.gate_up_proj" in name or "experts.down_proj" in name else shape[-1]
        values = 1.5 * values / np.sqrt(fan_in)
    return values.astype(np.float32)


def golden(case: str) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return transformers' logits [T, V] and router logits [L, T, E] of each sequence."""
    arrays = np.load(GOLDEN / case / "outputs.npz")
    return [(arrays[f"logits_{number}"], arrays.get(f"router_logits_{number}")) for number in range(len(LENGTHS))]


def write_golden_folder(case: str, folder: pathlib.Path) -> None:
    """Make the folder that transformers wrote once more."""
    (folder / "config.json").write_text((GOLDEN / case / "config.json").read_text())
    shapes = json.loads((GOLDEN / case / "tensors.json").read_text())
    tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
