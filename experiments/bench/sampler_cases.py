"""Cases of the sampler benchmark: models, prompts, and the shape of the answers that every sampler gives."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import models
from experiments.config import RUNS

Contender = Callable[[], np.ndarray]
"""Draws the answers to all prompts of a case: int32 [B, R] on the host."""

ROPE_THETA = 1e6  # Tunix's Qwen3 rotates by this base, whatever its config


@dataclass(frozen=True)
class Case:
    """A model and the responses to draw from it."""

    model: models.TransformerConfig
    rows: int
    prompt_tokens: int
    """Width of the prompts; their lengths run from half of it to all of it."""
    new_tokens: int
    group: int = 1
    """Number of consecutive rows with the same prompt, as in group-relative training; ours reads such a prompt once."""
    slots: int | None = None
    """Number of rows drawn at once, all if None: ours refills them, the others draw batch after batch."""
    stop_token: int | None = None
    """The token that ends a response, so that the responses of a batch differ in length."""


def _cases() -> dict[str, Case]:
    run = RUNS["countdown"]()
    countdown = dataclasses.replace(run.architecture(), rope_theta=ROPE_THETA)
    dense = dataclasses.replace(
        countdown,
        num_experts=1,
        num_experts_per_token=1,
        expert_size=countdown.num_experts_per_token * countdown.expert_size,
    )
    larger = models.TransformerConfig(
        vocab_size=8192,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_token=4,
        expert_size=256,
        rope_theta=ROPE_THETA,
    )
    new_tokens = run.trainer.sampler.max_new_tokens
    return {
        "countdown-64": Case(countdown, 64, 14, new_tokens),
        "countdown-512": Case(countdown, 512, 14, new_tokens),
        "countdown-64x8": Case(countdown, 512, 14, new_tokens, group=8),
        "countdown-queue": Case(countdown, 256, 14, 128, slots=32, stop_token=15),
        "dense-512": Case(dense, 512, 14, new_tokens),
        "larger-16": Case(larger, 16, 64, 64),
    }


CASES = _cases()
"""Countdown's model at two batch sizes, in groups as the trainer samples it, and with responses of different lengths in
a queue for 32 slots; the same model with one expert of equal active width; and a larger model."""


def make_prompts(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return left-padded int32 [B, P] tokens and their bool mask; token 0 is the padding and occurs nowhere else."""
    rng = np.random.default_rng(seed)
    shape = (case.rows // case.group, case.prompt_tokens)
    lengths = rng.integers((case.prompt_tokens + 1) // 2, case.prompt_tokens + 1, shape[0])
    mask = np.arange(case.prompt_tokens)[None, :] >= case.prompt_tokens - lengths[:, None]
    tokens = np.where(mask, rng.integers(1, case.model.vocab_size, shape), 0).astype(np.int32)
    return np.repeat(tokens, case.group, axis=0), np.repeat(mask, case.group, axis=0)


def in_batches(case: Case, answer: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Draw all rows, as many at once as there are slots; `answer` may return fewer columns if all rows end early."""
    size = case.slots or case.rows
    tokens = np.zeros((case.rows, case.new_tokens), np.int32)
    for first in range(0, case.rows, size):
        part = answer(slice(first, first + size))
        tokens[first : first + size, : part.shape[1]] = part
    return tokens


def responses(case: Case, tokens: np.ndarray) -> np.ndarray:
    """Return a bool [B, R] mask: True on the tokens [B, R] of a response, up to its first stop token."""
    stops = tokens == case.stop_token if case.stop_token is not None else np.zeros(tokens.shape, bool)
    return np.cumsum(stops, axis=1) - stops == 0
