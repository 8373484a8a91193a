"""Rollouts made by hand."""

import numpy as np

from rspo_jax.types import RolloutBatch

P, R = 5, 7
"""Prompt and response columns."""


def make_rollout(seed, prompts, answers, vocabulary=50):
    """Return a rollout of random tokens, given the lengths of its prompts and answers; padding is 0."""
    rng = np.random.default_rng(seed)
    columns = np.arange(P + R)[None, :]
    segment_ids = ((columns >= P - prompts[:, None]) & (columns < P + answers[:, None])).astype(np.int32)
    tokens = rng.integers(1, vocabulary, segment_ids.shape).astype(np.int32) * segment_ids
    mask = (segment_ids[:, 1:] > 0) & (columns[:, 1:] >= P)
    sampler_log_probs = np.where(mask, -rng.uniform(0.5, 3, mask.shape), 0).astype(np.float32)
    return RolloutBatch(tokens, segment_ids, mask, sampler_log_probs, rng.normal(size=len(prompts)).astype(np.float32))
