"""Packed rows against padded ones through a real model: the same loss, the same gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.rollouts import P, R, make_rollout

import models
from rspo_jax.log_probs import token_log_probs
from rspo_jax.objectives import OBJECTIVES
from rspo_jax.rollouts import unpack
from rspo_jax.rollouts.packing import balanced_parts, pack_rollout, padded_plan, plan_packing
from rspo_jax.routing import router_shift, trace_router
from rspo_jax.routing.shift import STEPS_PER_NAT

VOCABULARY, K, COUNT = 11, 2, 12
MODEL = models.Transformer(
    models.TransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_token=K,
        expert_size=16,
    )
)


def random_params(change):
    """Parameters of about the size of fresh ones, the same ones moved by `change` times noise."""
    shapes, rng = jax.eval_shape(lambda: models.init_params(MODEL.config, jax.random.key(0))), np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape) + change * rng.normal(size=leaf.shape)).astype(np.float32),
        shapes,
    )


def shift_off_the_grid(router_logits, old_router_logits):
    """γ [B, T] without the rounding of a trace, which turns the last bit of a logit into a step."""
    old = jax.nn.log_softmax(old_router_logits)
    _, expert_ids = jax.lax.top_k(old, K)
    change = jnp.take_along_axis(jax.nn.log_softmax(router_logits) - old, expert_ids, axis=-1)
    return jnp.exp(-jnp.mean(jnp.abs(change), axis=(0, -1)))


def read_tokens(params, old_params, inputs, targets, segment_ids):
    """log π, log π_old, γ and γ from a trace, [B, T] each."""

    def read(params):
        output = MODEL.apply({"params": params}, inputs, segment_ids=segment_ids)
        return token_log_probs(output.logits, targets), jax.lax.stop_gradient(output.router_logits)

    (log_probs, router_logits), (old_log_probs, old_router_logits) = read(params), read(old_params)
    traced = router_shift(router_logits, trace_router(old_router_logits, K))
    return log_probs, old_log_probs, shift_off_the_grid(router_logits, old_router_logits), traced


def rspo_terms(lines, advantages, mask):
    log_probs, old_log_probs, gamma, _ = lines
    mean, _ = OBJECTIVES["rspo"].terms(log_probs, old_log_probs, advantages, mask, gamma)
    return mean


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def plan_loss(params, old_params, rollout, plan):
    """The loss over all parts of a plan, and what was read of each response token, [B, R] in the rollout's order."""

    def part_terms(carry, part):
        rows, places, mask, advantages = part.rows, part.places, part.mask, part.advantages
        lines = [unpack(per_token, places) for per_token in read_tokens(params, old_params, *rows)]
        mean = rspo_terms(lines, advantages, mask)
        return (carry[0] + mean.total, carry[1] + mean.weight), lines

    zero = jnp.zeros(())
    (total, weight), lines = jax.lax.scan(part_terms, (zero, zero), pack_rollout(rollout, plan))
    back = jnp.argsort(plan.responses.reshape(-1))
    return total / weight, [line.reshape(-1, R)[back] for line in lines]


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def plain_loss(params, old_params, rollout):
    """The same on the rollout as it stands, without a plan."""
    lines = read_tokens(params, old_params, rollout.tokens[:, :-1], rollout.tokens[:, 1:], rollout.segment_ids[:, :-1])
    mean = rspo_terms(lines, rollout.advantages, rollout.mask)
    return mean.total / mean.weight, [line[:, P - 1 :] for line in lines]


def test_packed_rows_give_the_loss_and_the_gradient_of_padded_rows():
    prompts = np.array([1, 2, 5, 1, 3, 2, 1, 1, 4, 2, 5, 1])
    answers = np.array([1, 2, 7, 1, 3, 6, 2, 1, 7, 4, 1, 3])
    rollout = make_rollout(10, prompts, answers, VOCABULARY)
    params, old_params = random_params(0.0), random_params(0.02)
    responses = balanced_parts(prompts + answers, np.random.default_rng(12).permutation(COUNT), 2)
    padded = padded_plan(prompts, answers, P, R, responses)
    # As many rows as the padded plan has, so that one program is compiled; half of them stay empty.
    packed = plan_packing(prompts, answers, P, R, responses, rows_multiple=COUNT // 2)
    assert packed.source.shape == padded.source.shape and packed.segment_ids.max() > 2
    assert np.all(np.any(packed.segment_ids, axis=-1).sum(axis=-1) == COUNT // 4)

    (expected, expected_lines), expected_gradient = plain_loss(params, old_params, rollout)
    mask = rollout.mask[:, P - 1 :]
    assert np.asarray(expected_lines[2])[mask].min() < 0.98, "the router has moved"
    for plan in (packed, padded):
        (loss, lines), gradient = plan_loss(params, old_params, rollout, plan)
        np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-6)
        for line, expected_line, tolerance in zip(
            lines, expected_lines, (1e-6, 1e-6, 1e-6, 1 / STEPS_PER_NAT), strict=True
        ):
            np.testing.assert_allclose(np.asarray(line)[mask], np.asarray(expected_line)[mask], rtol=0, atol=tolerance)
        for leaf, expected_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            assert np.abs(expected_leaf).max() > 1e-4, "every parameter counts"
            np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-6)
