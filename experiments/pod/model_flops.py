"""The FLOPs that a model's arithmetic needs, counted from its sizes: what a compiled program's FLOPs are held against.

A multiplication and an addition are two. Matrix products and attention count; norms, softmaxes and routing by
comparison do not. A training step is three forward passes, the usual convention (Chowdhery et al., "PaLM", 2022,
appendix B); what the backward pass computes again comes on top. This file must never know a compiler.
"""

from typing import NamedTuple

import models
from experiments.pod.programs import DECODE, PREFILL, SCORE, UPDATE, Setting


class Parameters(NamedTuple):
    """Numbers of a model."""

    total: int
    active: int
    """Of those, in matrix products of one token: K experts of each layer, without embedding and norms."""


def count_parameters(c: models.TransformerConfig) -> Parameters:
    """Counts from the sizes."""
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    router, expert = c.hidden_size * c.num_experts, 3 * c.hidden_size * c.expert_size
    norms = 2 * c.hidden_size + 2 * c.head_dim
    head = c.hidden_size * c.vocab_size
    layer = attention + router + norms + c.num_experts * expert
    total = c.num_layers * layer + c.hidden_size + (1 if c.tie_embeddings else 2) * head
    return Parameters(total, c.num_layers * (attention + router + c.num_experts_per_token * expert) + head)


class ModelFlops(NamedTuple):
    """Of a whole program, over all devices."""

    needed: float
    """A forward pass, or three for an update."""
    with_remat: float
    """With what the backward pass computes again: with `remat="full"` one more forward pass."""


def model_flops(program: str, setting: Setting) -> ModelFlops:
    """FLOPs of one of the programs, every row one sequence that fills it."""
    c = setting.model
    rows, tokens = setting.batch, setting.row_length
    head = 2 * c.hidden_size * c.vocab_size
    layers = 2 * count_parameters(c).active - head
    to_each = 4 * c.num_layers * c.num_heads * c.head_dim  # of one token to one other: its logit and its value
    if program == DECODE:
        return ModelFlops(*(float(rows * (layers + head + to_each * tokens)),) * 2)
    if program == PREFILL:
        prompt = setting.prompt_length
        return ModelFlops(*(float(rows * (prompt * layers + head + to_each * prompt * (prompt + 1) // 2)),) * 2)
    forward = float(rows * (tokens * (layers + head) + to_each * tokens * (tokens + 1) // 2))
    assert program in (SCORE, UPDATE)
    if program == SCORE:
        return ModelFlops(forward, forward)
    # The head's logits are made again whatever `remat` says (`rspo_jax.head_log_probs`).
    again = forward if c.remat == "full" else float(rows * tokens * head)
    return ModelFlops(3 * forward, 3 * forward + again)
