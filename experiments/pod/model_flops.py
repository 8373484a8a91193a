"""FLOPs that a model's arithmetic needs, counted from its sizes, for comparison with those of a compiled program.

A multiplication and an addition are two. Matrix products and attention count; norms, softmaxes and routing by
comparison do not. A training step is three forward passes, the usual convention (Chowdhery et al., "PaLM", 2022,
appendix B); recomputation in the backward pass comes on top.
"""

from typing import NamedTuple

import jax

import models
from experiments.pod.programs import DECODE, PREFILL, SCORE, UPDATE, ProgramName, Setting


class Parameters(NamedTuple):
    """Numbers of a model's parameters."""

    total: int
    active: int
    """Those in matrix products of one token: K experts of each layer, without embedding, norms and biases."""


NO_PRODUCT = ("embedding", "scale", "sinks")
"""Names of the parameters, besides biases, that are in no matrix product."""


def count_parameters(c: models.TransformerConfig) -> Parameters:
    """Count a model's parameters by their shapes."""
    shapes = jax.eval_shape(lambda: models.init_params(c, jax.random.key(0)))
    total, active = 0, c.hidden_size * c.vocab_size if c.tie_embeddings else 0
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = [key.key for key in path]
        total += leaf.size
        if names[-1] in NO_PRODUCT or names[-1].endswith("bias"):
            continue
        of_experts = names[-2:] in (["moe", "gate_up"], ["moe", "down"])
        active += leaf.size * c.num_experts_per_token // c.num_experts if of_experts else leaf.size
    return Parameters(total, active)


class ModelFlops(NamedTuple):
    """FLOPs of a whole program, over all devices."""

    needed: float
    """FLOPs of a forward pass, or of three for an update."""
    with_remat: float
    """FLOPs with the backward pass's recomputation: with `remat="full"`, one more forward pass."""


def model_flops(program: ProgramName, setting: Setting) -> ModelFlops:
    """Count the FLOPs of one of the programs, with every row filled by one sequence."""
    c = setting.model
    rows, tokens = setting.batch, setting.row_length
    head = 2 * c.hidden_size * c.vocab_size
    layers = 2 * count_parameters(c).active - head
    if program == DECODE:
        return ModelFlops(*(float(rows * (layers + head + _attention_flops(c, tokens - 1, tokens))),) * 2)
    if program == PREFILL:
        prompt = setting.prompt_length
        return ModelFlops(*(float(rows * (prompt * layers + head + _attention_flops(c, 0, prompt))),) * 2)
    forward = float(rows * (tokens * (layers + head) + _attention_flops(c, 0, tokens)))
    assert program in (SCORE, UPDATE)
    if program == SCORE:
        return ModelFlops(forward, forward)
    # The head's logits are computed again whatever `remat` is (`rspo_jax.head_log_probs`).
    again = forward if c.remat == "full" else float(rows * tokens * head)
    return ModelFlops(3 * forward, 3 * forward + again)


def _attention_flops(c: models.TransformerConfig, first: int, end: int) -> int:
    """Return the FLOPs of attention logits and values for the tokens from `first` to before `end`, over all layers."""
    of_values = c.head_dim if c.latent is None else c.latent.value_dim
    sliding = len(c.sliding_layers)
    seen = (c.num_layers - sliding) * _seen_pairs(first, end) + sliding * _seen_pairs(first, end, c.sliding_window)
    return 2 * c.num_heads * (c.head_dim + of_values) * seen


def _seen_pairs(first: int, end: int, window: int | None = None) -> int:
    """Return the number of pairs of a token from `first` to before `end` and a token that it sees, itself included."""
    full = end if window is None else min(max(window, first), end)  # tokens before it see all earlier ones
    return (full * (full + 1) - first * (first + 1)) // 2 + (end - full) * (window or 0)
