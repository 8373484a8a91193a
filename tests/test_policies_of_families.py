"""The training step with policies other than a softmax mixture in all layers.

They have no router, or dense layers in between, or latent attention and a sigmoid router.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.random_params import draw_params

from models import LatentAttention, Transformer, TransformerConfig
from rspo_jax.objectives import OBJECTIVES
from rspo_jax.rollouts.packing import pack_rollout, plan_packing
from rspo_jax.routing import numbers_and_arrays
from rspo_jax.statistics import reduce
from rspo_jax.training import LearnerConfig, OptimizerConfig, init_train_state, score, update
from rspo_jax.types import RolloutBatch

SMALL = {"vocab_size": 19, "hidden_size": 12, "num_heads": 2, "num_kv_heads": 2, "head_dim": 6, "expert_size": 8}
DENSE = TransformerConfig(**SMALL, num_layers=1, num_experts=0, dense_size=10)
MIXED = TransformerConfig(**SMALL, num_layers=3, num_experts=4, dense_layers=(1,), dense_size=10)
DEEPSEEK = TransformerConfig(
    **{**SMALL, "head_dim": 10},
    num_layers=2,
    num_experts=4,
    latent=LatentAttention(kv_rank=7, plain_dim=6, rotary_dim=4, value_dim=5),
    query_key_norm="none",
    router="sigmoid",
    shared_expert_size=6,
    dense_layers=(0,),
    dense_size=10,
)
ROWS, WIDTH, PROMPT = 4, 9, 3


def batch():
    rng = np.random.default_rng(0)
    ones = np.ones((ROWS, WIDTH + 1), np.int32)
    mask = np.arange(WIDTH)[None] >= PROMPT - 1
    rollout = RolloutBatch(
        tokens=jnp.asarray(rng.integers(0, 19, ones.shape), jnp.int32),
        segment_ids=jnp.asarray(ones),
        mask=jnp.asarray(mask.repeat(ROWS, axis=0)),
        sampler_log_probs=jnp.full((ROWS, WIDTH), -2.0),
        advantages=jnp.asarray([1.0, -1.0, 0.5, -0.5]),
    )
    width = WIDTH + 1 - PROMPT
    lengths = np.full(ROWS, PROMPT), np.full(ROWS, width)
    return pack_rollout(rollout, plan_packing(*lengths, PROMPT, width, np.arange(ROWS).reshape(1, -1), None))


def learn(config, objective):
    """Return the statistics of two updates on the same responses, and the route."""
    policy, learner, optimizer = Transformer(config), LearnerConfig(objective=objective), OptimizerConfig(3e-2, 0)

    @jax.jit
    def begin(params, rollout):
        return init_train_state(params, optimizer), score(policy, params, rollout, learner)[0]

    @jax.jit
    def step(state, scored):
        state, statistics = update(policy, optimizer, state, scored, learner)
        return state, reduce(statistics)

    rows = []
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        state, scored = begin(draw_params(config), batch())
        for _ in range(2):
            state, statistics = step(state, scored)
            rows.append(numbers_and_arrays(statistics)[0])
    return rows, scored.old_route


@pytest.mark.parametrize(
    "objective", [name if name == "rspo" else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
def test_every_objective_learns_without_a_router(objective):
    (first, second), route = learn(DENSE, objective)
    assert route is None
    assert first["grad_norm"] > 0 and first["skipped_updates"] == second["skipped_updates"] == 0
    if objective == "cispo":  # its value moves with its weights, which have no gradient
        assert second["loss"] != first["loss"]
    else:
        assert second["loss"] < first["loss"]
    assert second.get("gamma_mean", 1.0) == 1.0


@pytest.mark.parametrize(("config", "layers"), [(MIXED, 2), pytest.param(DEEPSEEK, 1, marks=pytest.mark.slow)])
def test_the_shift_covers_the_layers_that_have_a_router(config, layers):
    (first, second), route = learn(config, "rspo")
    assert route.expert_ids.shape == (1, ROWS, layers, 2, WIDTH)
    assert first["gamma_mean"] == 1.0  # on-policy, exactly
    assert 0 < second["gamma_mean"] < 1 and second["skipped_updates"] == 0
