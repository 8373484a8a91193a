"""The FLOPs and parameters of a model against its real parameters and a plain count, and the kernels' FLOPs."""

import jax
import numpy as np
import pytest

import models
from experiments.compilers.hlo import ArrayType, Instruction
from experiments.pod.analysis import attention_flops
from experiments.pod.model_flops import count_parameters, model_flops
from experiments.pod.presets import MODELS
from experiments.pod.programs import PROGRAMS, Setting
from rspo_jax.sharding import MeshConfig

TINY = models.TransformerConfig(
    vocab_size=40, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, num_experts=8, expert_size=10
)


SLIDING = models.TransformerConfig(**vars(TINY) | {"sliding_window": 3, "sliding_layers": (0, 2)})


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied):
    config = models.TransformerConfig(**vars(TINY) | {"tie_embeddings": tied})
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    assert count_parameters(config).total == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3-30b-a3b", 30.5e9, 3.3e9),
        ("qwen3-235b-a22b", 235e9, 22e9),
        ("mixtral-8x7b", 46.7e9, 12.9e9),
        ("gpt-oss-120b", 116.8e9, 5.1e9 + 201_088 * 2880),
    ],
)
def test_the_public_sizes(name, total, active):
    """As the model cards give them; the active ones there count the embedding too."""
    found = count_parameters(MODELS[name])
    embedding = MODELS[name].vocab_size * MODELS[name].hidden_size
    assert found.total == pytest.approx(total, rel=0.01)
    assert found.active + embedding == pytest.approx(active, rel=0.03)


def by_hand(config: models.TransformerConfig, queries: int, first: int, scored: int) -> float:
    """One sequence: `queries` tokens from position `first`, of which `scored` meet the head. Products one by one."""
    c, total = config, 0.0
    for token in range(queries):
        for layer in range(c.num_layers):
            seen = first + token + 1
            if layer in c.sliding_layers:
                seen = min(seen, c.sliding_window)
            total += 2 * c.hidden_size * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim  # queries, keys, values
            total += c.num_heads * seen * 2 * (2 * c.head_dim)  # logits and values
            total += 2 * c.num_heads * c.head_dim * c.hidden_size  # output
            total += 2 * c.hidden_size * c.num_experts
            total += c.num_experts_per_token * 3 * 2 * c.hidden_size * c.expert_size
    return total + scored * 2 * c.hidden_size * c.vocab_size


@pytest.mark.parametrize("config", [TINY, SLIDING])
@pytest.mark.parametrize("program", PROGRAMS)
def test_flops_are_counted_product_by_product(program, config):
    setting = Setting(config, MeshConfig(), batch=5, row_length=9, prompt_length=4)
    expected = {
        "score": by_hand(config, 9, 0, 9),
        "update": 3 * by_hand(config, 9, 0, 9),
        "prefill": by_hand(config, 4, 0, 1),
        "decode": by_hand(config, 1, 8, 1),
    }
    assert model_flops(program, setting).needed == 5 * expected[program]


def test_what_is_computed_again():
    setting = Setting(TINY, MeshConfig(), batch=5, row_length=9, prompt_length=4)
    forward = model_flops("score", setting).needed
    head = 5 * 9 * 2 * TINY.hidden_size * TINY.vocab_size
    assert model_flops("update", setting).with_remat == 3 * forward + head
    full = Setting(models.TransformerConfig(**vars(TINY) | {"remat": "full"}), MeshConfig(), 5, 9, 4)
    assert model_flops("update", full).with_remat == 4 * forward


@pytest.mark.parametrize(("kernel", "products"), [("splash_mha_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)])
def test_attention_kernels_count_pairs_under_the_mask(kernel, products):
    rows, heads, tokens, head_dim = 2, 3, 8, 4
    pairs = np.tril(np.ones((tokens, tokens))).sum()
    call = Instruction("a", "custom-call", (), True, (), "", f'metadata={{op_name="jit(f)/{kernel}_segmented/call"}}')
    one_row = rows * heads * pairs * products * 2 * head_dim / rows
    for leading in ((rows,), ()):
        types = [
            ArrayType("s8", (1, 2, 2)),
            ArrayType("bf16", (*leading, heads, tokens, head_dim)),
            ArrayType("s32", (2, 8, 128)),
        ]
        operands = [Instruction("x", "parameter", (array,), False, (), "", "") for array in types]
        assert attention_flops(call, operands) == one_row * (rows if leading else 1)
    other = Instruction("a", "custom-call", (), True, (), "", 'metadata={op_name="jit(f)/gmm"}')
    assert attention_flops(other, operands) is None
