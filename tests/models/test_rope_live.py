"""Rotary positions against those of transformers, for configurations of published models. Needs PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.rope import RopeScaling, inverse_frequencies, logit_scale, rotary_angles, rotate, rotate_pairs

torch = pytest.importorskip("torch")
from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek  # noqa: E402

pytestmark = pytest.mark.slow

NAMES = {"kind": "rope_type", "original_max_positions": "original_max_position_embeddings"}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_positions": 32768}
DEEPSEEK = {
    "kind": "yarn",
    "factor": 40.0,
    "original_max_positions": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "kind": "llama3",
    "factor": 8.0,
    "original_max_positions": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CASES = {
    "linear": (Qwen3MoeConfig, 128, 1e6, {"kind": "linear", "factor": 4.0}),
    "qwen": (Qwen3MoeConfig, 128, 1e6, YARN),
    "a head of 96": (Qwen3MoeConfig, 96, 1e4, YARN),
    "attention factor": (Qwen3MoeConfig, 64, 1e4, YARN | {"attention_factor": 0.8}),
    "gpt-oss": (
        GptOssConfig,
        64,
        1.5e5,
        DEEPSEEK | {"factor": 32.0, "truncate": False, "mscale": None, "mscale_all_dim": None},
    ),
    "deepseek": (DeepseekV3Config, 64, 1e4, DEEPSEEK),
    "deepseek-v2-lite": (DeepseekV3Config, 64, 1e4, DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.707}),
    "kimi": (DeepseekV3Config, 64, 5e4, DEEPSEEK | {"factor": 32.0}),
    "two mscales": (DeepseekV3Config, 64, 1e4, DEEPSEEK | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "llama3": (Qwen3MoeConfig, 128, 5e5, LLAMA3),
    "llama 3.2": (Qwen3MoeConfig, 64, 5e5, LLAMA3 | {"factor": 32.0}),
}


def published(config_type, dim, theta, fields):
    """Return a configuration of transformers with these rotary positions and this head size."""
    parameters = {NAMES.get(name, name): value for name, value in fields.items() if value is not None}
    size = {"qk_rope_head_dim": dim} if config_type is DeepseekV3Config else {"head_dim": dim}
    return config_type(rope_parameters=parameters | {"rope_theta": theta}, max_position_embeddings=262144, **size)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_scales_agree(name):
    config_type, dim, theta, fields = CASES[name]
    config, scaling = published(config_type, dim, theta, fields), RopeScaling(**fields)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[fields["kind"]](config, "cpu")
    frequencies, factor = inverse_frequencies(dim, theta, scaling)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert logit_scale(192, scaling) == pytest.approx(deepseek.yarn_apply_mscale(config.rope_parameters, 192**-0.5))


@pytest.mark.parametrize(
    ("turn", "reference"),
    [(rotate, deepseek.apply_rotary_pos_emb), (rotate_pairs, deepseek.apply_rotary_pos_emb_interleave)],
)
def test_rotations_agree(turn, reference):
    config_type, dim, theta, fields = CASES["two mscales"]
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 7, 4, dim)).astype(np.float32)
    keys = rng.normal(size=(2, 7, 1, dim)).astype(np.float32)
    positions = rng.integers(0, 300, size=(2, 7)).astype(np.int32)
    angles = rotary_angles(jnp.asarray(positions), dim, theta, RopeScaling(**fields))

    tensors = [torch.from_numpy(array).transpose(1, 2) for array in (queries, keys)]
    embedding = deepseek.DeepseekV3RotaryEmbedding(published(config_type, dim, theta, fields))
    expected = reference(*tensors, *embedding(tensors[0], torch.from_numpy(positions).long()))
    for array, tensor in zip((queries, keys), expected, strict=True):
        np.testing.assert_allclose(turn(array, *angles), tensor.transpose(1, 2).numpy(), atol=2e-4)
